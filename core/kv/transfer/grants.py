"""Who may touch which local blocks, for how long, by this worker's own clock.

A peer names a session; the blocks that it reads or writes must belong to that session and the session must be alive,
before the transfer and, where the transport lets this side know, after it. Leases are durations counted here: no
clock of another host takes part.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from core.kv.lease import Clock, lease_clock
from core.kv.transfer.errors import TransferLate, TransferRefused


class Access(StrEnum):
    """What a grant allows a peer to do."""

    READ = "read"
    WRITE = "write"


class StatusEntry(ctypes.Structure):
    """One session on the board that processes of the same host can read."""

    _fields_ = (("stamp", ctypes.c_uint64), ("expires", ctypes.c_double))


class Proof(msgspec.Struct, frozen=True):
    """Where on the board a session stands. It stands there while its stamp does."""

    entry: int
    stamp: int


BOARD_ENTRIES = 16384


class Grant(msgspec.Struct, frozen=True):
    """Blocks that a session exposes to peers."""

    blocks: frozenset[int]
    access: Access
    expires: float
    """By this worker's clock."""
    proof: Proof | None
    """None when the board is full."""


class Grants:
    """The live sessions of one pool. Thread-safe."""

    def __init__(self, clock: Clock = lease_clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._grants: dict[str, Grant] = {}
        self._board = (StatusEntry * BOARD_ENTRIES)()
        self._vacant = list(range(BOARD_ENTRIES - 1, -1, -1))
        self._stamp = 0

    @property
    def board(self) -> int:
        """Address of the board."""
        return ctypes.addressof(self._board)

    def proof(self, session: str) -> Proof | None:
        """Where a session stands on the board, if it does."""
        with self._lock:
            grant = self._grants.get(session)
        return None if grant is None else grant.proof

    def grant(self, session: str, blocks: Iterable[int], access: Access, lease: float) -> None:
        """Expose blocks for `lease` seconds from now. Repeating a session extends or changes it.

        Raises `ValueError` for a lease that is not positive.
        """
        if lease <= 0:
            raise ValueError(f"lease of session {session!r} is {lease} s; it must be positive")
        with self._lock:
            self._strike(session)
            expires = self._clock() + lease
            self._grants[session] = Grant(frozenset(blocks), access, expires, self._post(access, expires))

    def revoke(self, session: str) -> bool:
        """End a session's exposure; whether there was one. Transfers that run are refused when they ask again."""
        with self._lock:
            return self._strike(session)

    def require(self, session: str, blocks: Iterable[int], access: Access) -> float:
        """Seconds left of the grant. Raises `TransferRefused` or `TransferLate` when it does not cover the blocks."""
        with self._lock:
            grant = self._grants.get(session)
        if grant is None:
            raise TransferRefused(f"KV session {session!r} is not held here: it was released, or never existed")
        left = grant.expires - self._clock()
        if left <= 0:
            raise TransferLate(
                f"the lease of KV session {session!r} ended {max(0.0, -left):.3f} s ago: its blocks may be reused"
            )
        if grant.access != access:
            raise TransferRefused(f"KV session {session!r} may be used to {grant.access}, not to {access}")
        if not grant.blocks.issuperset(blocks):
            outside = sorted(set(blocks) - grant.blocks)
            raise TransferRefused(
                f"blocks {outside[:8]} do not belong to KV session {session!r}, which holds {len(grant.blocks)} others"
            )
        return left

    def expire(self) -> list[str]:
        """Remove and name the sessions whose lease has ended."""
        with self._lock:
            now = self._clock()
            ended = [session for session, grant in self._grants.items() if grant.expires <= now]
            for session in ended:
                self._strike(session)
        return ended

    @property
    def sessions(self) -> frozenset[str]:
        """Sessions that are exposed now."""
        with self._lock:
            return frozenset(self._grants)

    def _post(self, access: Access, expires: float) -> Proof | None:
        if access is not Access.READ or not self._vacant:
            return None
        entry = self._vacant.pop()
        self._stamp += 1
        self._board[entry].expires = expires
        self._board[entry].stamp = self._stamp
        return Proof(entry, self._stamp)

    def _strike(self, session: str) -> bool:
        grant = self._grants.pop(session, None)
        if grant is not None and grant.proof is not None:
            self._board[grant.proof.entry].stamp = 0
            self._vacant.append(grant.proof.entry)
        return grant is not None
