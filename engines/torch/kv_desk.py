"""What a worker does with KV for others: holds it under sessions, hands it out, makes room for it and takes it in.

Lives on the event loop; the blocks themselves are the engine thread's (`kv_holds.py`). A session's name is a secret
between its holder and whoever was given its ticket or reservation. The core's leases end sessions; those here are for
a core that lost track of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from core.kv.fingerprint import require_match
from core.kv.lease import Deadline, LeaseTerms
from core.kv.session import KvSessions, LeaseRefused, Outcome
from core.kv.ticket import TicketRefused
from core.kv.transfer import Access, CanonicalKv, KvPool, TransferLate, TransferRefused
from core.messages import (
    Delta,
    EngineConfig,
    EngineError,
    EngineInfo,
    EngineRequest,
    KvReservation,
    KvTicket,
    Overloaded,
    Rendezvous,
)
from engines.torch.kv_push import Push
from engines.torch.kv_ranks import KvRanks
from engines.torch.sequence import Sequence
from engines.torch.stepper import Computed
from engines.torch.thread import EngineThread

UNFETCHED = 4.0
"""Leases for which a session lasts that the core neither exports nor releases."""
ROOM_SECONDS = 3600.0
"""For which room is kept that the core forgot: longer than all deadlines of one request together."""


@dataclass
class Held:
    """A prompt's KV, for a worker that is to fetch it or for a room that it is pushed to."""

    blocks: list[int]
    num_tokens: int
    push: Push | None


@dataclass
class Room:
    """Blocks for a prompt's KV to come."""

    sequence: Sequence
    blocks: list[int]
    fresh: list[int]
    """Those of the blocks that a transfer may write to: nobody else holds them."""
    cached_tokens: int
    busy: bool = False
    filled: bool = False
    first: Delta | None = None


class KvDesk:
    """The sessions of one worker. `open` it once the engine has started, `close` it before the engine thread ends."""

    def __init__(self, thread: EngineThread, ranks: KvRanks, config: EngineConfig, info: EngineInfo) -> None:
        """Use `open`."""
        self.ranks = ranks
        self._thread = thread
        self._info = info
        self._terms = LeaseTerms.of(config.kv_lease)
        self._sessions = KvSessions(self._free)
        self._held: dict[str, Held] = {}
        self._rooms: dict[str, Room] = {}
        self._pushes: dict[str, Push] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    @classmethod
    async def open(cls, thread: EngineThread, pools: list[KvPool], config: EngineConfig, info: EngineInfo) -> KvDesk:
        """Makes the cache reachable for peers. Raises `ConfigError` for settings that cannot work here."""
        LeaseTerms.of(config.kv_lease)
        return cls(thread, await KvRanks.open(pools, config), config, info)

    async def close(self) -> None:
        """Ends every session and takes the cache out of everybody's reach. Idempotent."""
        for push in list(self._pushes.values()):
            await push.stop(now=True)
        await self._sessions.close()
        await self.ranks.close()

    def refuse_all(self) -> None:
        """Grants end now: the cache is about to go."""
        for session in self.ranks.sessions:
            self.ranks.revoke(session)

    async def wait_empty(self) -> None:
        """Returns when no session is left."""
        await self._empty.wait()

    def check_integrity(self) -> None:
        """Asserts that every session has an owner, and every grant a session."""
        self._sessions.check_integrity()
        self.ranks.check_integrity()
        named = self._held.keys() | self._rooms.keys()
        assert self._sessions.live <= named, f"sessions {sorted(self._sessions.live - named)} hold nothing"
        grants = self.ranks.sessions
        assert grants <= named, f"blocks of {sorted(grants - named)} are granted and no session holds them"

    # The prefill side.

    def new_session(self, request: EngineRequest) -> str:
        """A name that nobody can guess."""
        return f"{request.request_id}.{secrets.token_hex(8)}"

    def begin_push(self, session: str, reservation: KvReservation) -> Push:
        """For a prompt that is about to be computed. Raises `EngineError` when the room cannot be reached."""
        target = _canonical(reservation.payload, f"KV reservation '{reservation.session}'")
        self.ranks.reach(target)
        seconds = self._terms.usable if reservation.expires_in is None else reservation.expires_in
        push = Push(
            self.ranks,
            target,
            cached_tokens=reservation.cached_tokens,
            seconds=seconds,
            unpin=self._thread.free,
        )
        self._pushes[session] = push
        return push

    def computed(self, parts: list[Computed]) -> None:
        """Blocks of prompts under way that can be pushed."""
        for part in parts:
            push = self._pushes.get(part.session)
            if push is None:
                self._thread.free(part.pin)
            else:
                push.add(part)

    async def end_push(self, session: str, *, now: bool) -> None:
        """Return when nothing is written for the session. It can be resumed by `export`."""
        push = self._pushes.get(session)
        if push is not None:
            await push.stop(now=now)
            self._pushes.pop(session, None)

    def hold(self, session: str, sequence: Sequence, push: Push | None) -> None:
        """The sequence's prompt was computed and its blocks are held under this name."""
        self._held[session] = Held(sequence.block_table.tolist(), sequence.num_prompt, push)
        lease = UNFETCHED * self._terms.lease
        self._sessions.open(session, LeaseTerms.of(lease))
        self._empty.clear()

    def drop(self, session: str) -> None:
        """Frees what a prefill that came to nothing may have left."""
        self._thread.free(session)

    async def export(self, session: str, reservation: KvReservation | None) -> KvTicket:
        """See `EngineSpec.export_kv`."""
        held = self._held.get(session)
        if held is None:
            raise LeaseRefused(f"KV session '{session}' is not held here: it was released, has expired, or never was.")
        terms = LeaseTerms.of(min(self._terms.lease, self._sessions.claim(session, "")))
        if reservation is None:
            shards = await self.ranks.grant(session, held.blocks, Access.READ, terms.usable)
            kv = CanonicalKv(session, held.num_tokens, shards)
        else:
            kv = await self._push_rest(session, held, reservation)
        if self._held.get(session) is not held:
            self.ranks.revoke(session)
            raise LeaseRefused(f"KV session '{session}' was released while it was exported.")
        return KvTicket(
            engine="torch",
            engine_version=self._info.version or self._info.kv_fingerprint["engine_version"],
            fingerprint=self._info.kv_fingerprint,
            session=session,
            worker_id=self.ranks.worker_id,
            rendezvous=Rendezvous.PULL if reservation is None else Rendezvous.PUSH,
            expires_in=terms.lease,
            num_tokens=held.num_tokens,
            canonical=True,
            payload=msgspec.to_builtins(kv, builtin_types=(bytes,)),
        )

    async def _push_rest(self, session: str, held: Held, reservation: KvReservation) -> CanonicalKv:
        if held.push is None:
            held.push = self.begin_push(session, reservation)
            del self._pushes[session]
        elif reservation.expires_in is not None:
            held.push.postpone(reservation.expires_in)
        with _refusing():
            await held.push.finish(held.blocks, held.num_tokens)
        first = reservation.cached_tokens // self.ranks.block_size
        shards = await self.ranks.describe(held.blocks[first:])
        return CanonicalKv(session, held.num_tokens, shards, first * self.ranks.block_size)

    # The decode side.

    async def reserve(self, sequence: Sequence) -> KvReservation:
        """See `EngineSpec.reserve_kv`. The sequence is the one that will go on behind the KV."""
        request = sequence.request
        session = self.new_session(request)
        try:
            granted = await self._thread.between_steps(
                lambda scheduler: None if scheduler.cramped else scheduler.holds.reserve(session, request)
            )
        except asyncio.CancelledError:
            self._thread.free(session)
            raise
        if granted is None:
            raise Overloaded(
                f"No room for the KV of {len(request.token_ids)} tokens: the cache is full. Try again, lower the load, "
                "or raise num-kv-blocks."
            )
        blocks, cached = granted
        room = Room(sequence, blocks, blocks[cached:], cached * self._info.block_size)
        self._rooms[session] = room
        self._sessions.open(session, LeaseTerms.of(ROOM_SECONDS))
        self._empty.clear()
        seconds = LeaseTerms.of(ROOM_SECONDS).usable
        shards = await self.ranks.grant(session, room.fresh, Access.WRITE, seconds)
        target = CanonicalKv(session, len(request.token_ids), shards, room.cached_tokens)
        return KvReservation(
            session=session,
            num_tokens=len(request.token_ids),
            cached_tokens=room.cached_tokens,
            payload=msgspec.to_builtins(target, builtin_types=(bytes,)),
        )

    async def import_(self, ticket: KvTicket, session: str) -> None:
        """See `EngineSpec.import_kv`."""
        deadline = Deadline.after(ticket.expires_in)
        if deadline.passed():
            raise TransferLate(f"KV ticket for session '{ticket.session}' has expired: its blocks may be reused")
        room = self._room(session)
        if room.busy or room.filled:
            raise EngineError(
                f"KV reservation '{session}' {'has its KV' if room.filled else 'is being filled'} already."
            )
        kv = self._check_ticket(ticket, room)
        num_tokens = (
            ticket.num_tokens if ticket.first is not None else min(ticket.num_tokens, room.sequence.num_prompt - 1)
        )
        room.busy = True
        try:
            # Between the transfers of one import the blocks would be claimed by none of them.
            with self.ranks.claimed(room.fresh), _refusing():
                # Nobody writes from here on but this import.
                self.ranks.revoke(session)
                if ticket.rendezvous is Rendezvous.PULL:
                    await self.ranks.fetch(kv, room.blocks, cached_tokens=room.cached_tokens, deadline=deadline)
                else:
                    await self.ranks.verify(kv, room.fresh, first_token=room.cached_tokens)
        finally:
            room.busy = False
        await self._untouched(room, deadline)
        if self._rooms.get(session) is not room:
            raise LeaseRefused(f"KV reservation '{session}' was released while its KV came in.")
        room.filled, room.first, room.fresh = True, ticket.first, []
        request = room.sequence.request
        if not await self._thread.between_steps(lambda scheduler: scheduler.holds.fill(session, request, num_tokens)):
            raise LeaseRefused(f"KV reservation '{session}' was released while its KV came in.")

    def take(self, session: str, request: EngineRequest) -> Room:
        """The room of a prompt whose KV was imported, to be decoded. Its hold passes to the caller.

        Raises: `EngineError` when there is none, it is not filled, or it is of another request.
        """
        room = self._room(session)
        if not room.filled:
            raise EngineError(f"KV reservation '{session}' has no KV yet: import it first.")
        if room.sequence.request != request:
            raise EngineError(
                f"KV reservation '{session}' is of request '{room.sequence.request_id}' as it was when room was "
                f"reserved; decode it with that very request, not with '{request.request_id}'."
            )
        self._sessions.hand_over(session)
        del self._rooms[session]
        self._note_end()
        return room

    def release(self, session: str) -> None:
        """See `EngineSpec.release_kv`."""
        self._sessions.settle(session, Outcome.RELEASED)

    def _room(self, session: str) -> Room:
        room = self._rooms.get(session)
        if room is None:
            raise LeaseRefused(
                f"KV reservation '{session}' is not held here: it was released, was decoded, has expired, or never was."
            )
        return room

    def _check_ticket(self, ticket: KvTicket, room: Room) -> CanonicalKv:
        name = f"KV ticket for session '{ticket.session}'"
        require_match(
            self._info.kv_fingerprint,
            ticket.fingerprint,
            canonical=True,
            our_name=f"worker '{self.ranks.worker_id}'",
            their_name=f"worker '{ticket.worker_id}'",
        )
        if not ticket.canonical or ticket.rendezvous not in (Rendezvous.PULL, Rendezvous.PUSH):
            form = "canonical" if ticket.canonical else f"'{ticket.engine}'-only"
            raise TicketRefused(
                f"{name} is a {form} one for {ticket.rendezvous}; this engine takes canonical pull or push."
            )
        kv = _canonical(ticket.payload, name)
        prompt = room.sequence.num_prompt
        least = prompt if ticket.first is not None else 1
        if kv.session != ticket.session or kv.num_tokens != ticket.num_tokens or not least <= kv.num_tokens <= prompt:
            raise TicketRefused(
                f"{name} covers {ticket.num_tokens} tokens, and its payload {kv.num_tokens} of session '{kv.session}'; "
                f"the prompt has {prompt}."
            )
        return kv

    async def _untouched(self, room: Room, deadline: Deadline) -> None:
        """Return when no transfer can touch the room's blocks any more. Raises `TransferLate`."""
        # A transfer lets go of its blocks within microseconds of its end; there is nothing to be notified by.
        while self.ranks.touches(room.fresh) and not deadline.passed():  # noqa: ASYNC110
            await asyncio.sleep(0.0005)
        if deadline.passed():
            raise TransferLate("the KV arrived after the deadline and is not used")

    async def _free(self, session: str) -> None:
        """Frees what a session held, as its lease or its release says."""
        self.ranks.revoke(session)
        held, room = self._held.pop(session, None), self._rooms.pop(session, None)
        if held is not None or room is None or room.filled:
            self._thread.free(session)
        else:
            fresh = set(room.fresh)
            if cached := [block for block in room.blocks if block not in fresh]:
                self._thread.free(session, cached)
            # A transfer that was given up may still write.
            self.ranks.free_when_idle(room.fresh, lambda blocks: self._thread.free(session, blocks))
        self._note_end()

    def _note_end(self) -> None:
        if not self._held and not self._rooms:
            self._empty.set()


def _canonical(payload: object, name: str) -> CanonicalKv:
    try:
        kv = msgspec.convert(payload, CanonicalKv)
    except msgspec.ValidationError as error:
        raise TicketRefused(f"{name} does not hold canonical KV ({error}): it was changed on its way.") from error
    if not kv.shards:
        raise TicketRefused(f"{name} names no blocks.")
    return kv


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What contradicts itself in a ticket or reservation is the other side's fault."""
    try:
        yield
    except ValueError as error:
        raise TransferRefused(f"KV cannot be moved as described by the other side: {error}") from error
