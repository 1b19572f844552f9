"""Who may touch which local blocks, for how long, by this worker's own clock.

A peer names a session; the blocks that it reads or writes must belong to that session and the session must be alive,
before the transfer and, where the transport lets this side know, after it. Leases are durations counted here: no
clock of another host takes part.
"""

from __future__ import annotations

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


class Grant(msgspec.Struct, frozen=True):
    """Blocks that a session exposes to peers."""

    blocks: frozenset[int]
    access: Access
    expires: float
    """By this worker's clock."""


class Grants:
    """The live sessions of one pool. Thread-safe."""

    def __init__(self, clock: Clock = lease_clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._grants: dict[str, Grant] = {}

    def grant(self, session: str, blocks: Iterable[int], access: Access, lease: float) -> None:
        """Expose blocks for `lease` seconds from now. Repeating a session extends or changes it.

        Raises `ValueError` for a lease that is not positive.
        """
        if lease <= 0:
            raise ValueError(f"lease of session {session!r} is {lease} s; it must be positive")
        with self._lock:
            self._grants[session] = Grant(frozenset(blocks), access, self._clock() + lease)

    def revoke(self, session: str) -> bool:
        """End a session's exposure; whether there was one. Transfers that run are refused when they ask again."""
        with self._lock:
            return self._grants.pop(session, None) is not None

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
                del self._grants[session]
        return ended

    @property
    def sessions(self) -> frozenset[str]:
        """Sessions that are exposed now."""
        with self._lock:
            return frozenset(self._grants)
