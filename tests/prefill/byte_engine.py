"""A small honest engine whose KV are bytes: what it generates depends on every byte of KV that it holds.

A block's content depends on all tokens up to its end; freed blocks are overwritten. A token is a hash over the held
bytes, so a decode that continues from KV that did not arrive, arrived late or is another's says something else.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator

from core.engine import EngineHost, EngineRegistry, Source, hookimpl
from core.kv.fingerprint import CANONICAL_FIELDS
from core.messages import (
    Capabilities,
    Delta,
    EngineConfig,
    EngineDescription,
    EngineError,
    EngineInfo,
    EngineRequest,
    FinishReason,
    KvReservation,
    KvTicket,
    Load,
    Overloaded,
    PrefillResult,
    Rendezvous,
    RequestRejected,
    Role,
)

BLOCK = 4
VOCABULARY = 509
EOS = 0
DEAD = b"\xdd" * 16
FINGERPRINT = dict.fromkeys(CANONICAL_FIELDS, "bytes")
POISON = 13
"""A prompt that begins with this token is rejected by the engine."""


class Fabric:
    """What the engines of one test share: each other's memory, and places to meet."""

    def __init__(self) -> None:
        self.engines: dict[str, ByteEngine] = {}
        self.meetings: dict[str, asyncio.Future[tuple[ByteEngine, list[int], asyncio.Event]]] = {}


class Gate:
    """Where a test can stop an engine, and make it fail."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.arrived = asyncio.Event()
        self.errors: list[BaseException] = []
        self.passed = 0

    def close(self) -> None:
        self.open.clear()
        self.arrived.clear()

    def fail(self, *errors: BaseException) -> None:
        self.errors += errors

    async def pass_(self) -> None:
        self.arrived.set()
        await self.open.wait()
        self.passed += 1
        if self.errors:
            raise self.errors.pop(0)


class ByteEngine:
    """See above. `gates` stop it before the named hook does its work; "write" is between the blocks of a push."""

    def __init__(self, fabric: Fabric, rendezvous: frozenset[Rendezvous], blocks: int, *, samples_first: bool) -> None:
        self.fabric = fabric
        self.rendezvous = rendezvous
        self.samples_first = samples_first
        """Ignores the prefill's token and computes the first one itself, as some engines do."""
        self.pool = [DEAD] * blocks
        self.free = list(range(blocks))
        self.sessions: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.firsts: dict[str, Delta | None] = {}
        self.gates = {name: Gate() for name in ("prefill", "export", "reserve", "import", "decode", "write", "read")}
        self.calls: Counter[str] = Counter()
        self.running: dict[str, asyncio.Event] = {}
        self.lease = 3600.0
        self.model = "bytes"
        self.exports: str | None = None
        """What a ticket says of the model, should it lie."""
        self.number = 0

    # Life.

    @hookimpl
    def describe_engine(self) -> EngineDescription:
        return EngineDescription(
            name="bytes",
            summary="KV of bytes",
            model_required=False,
            capabilities=Capabilities(
                roles=frozenset(Role), rendezvous=self.rendezvous, canonical_kv=True, priority=True
            ),
        )

    @hookimpl
    async def start_engine(self, config: EngineConfig, role: Role) -> EngineInfo:
        self.worker_id = config.worker_id
        self.fabric.engines[config.worker_id] = self
        return EngineInfo(
            engine="bytes",
            version="1",
            model="bytes",
            role=role,
            vocab_size=VOCABULARY,
            max_model_len=4096,
            eos_token_ids=(EOS,),
            block_size=BLOCK,
            num_kv_blocks=len(self.pool),
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            device="cpu",
            dtype="bytes",
            kv_fingerprint=FINGERPRINT | {"model": self.model},
        )

    @hookimpl
    async def stop_engine(self) -> None:
        for aborted in self.running.values():
            aborted.set()

    @hookimpl
    def load(self) -> list[Load]:
        held = sum(len(blocks) for blocks in self.sessions.values())
        return [Load(running=len(self.running), waiting=0, kv_blocks_used=held, kv_blocks_total=len(self.pool))]

    @hookimpl
    async def abort(self, request_id: str) -> None:
        self.calls["abort"] += 1
        if request_id in self.running:
            self.running[request_id].set()

    # Generation.

    @hookimpl
    async def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:
        self.calls["decode"] += 1
        aborted = self.running[request.request_id] = asyncio.Event()
        session = kv
        try:
            await self._gate("decode", aborted)
            if session is None:
                session = self._allocate(len(request.token_ids))
                self._write(session, request.token_ids, 0)
                generated: list[int] = []
            else:
                assert self.lengths[session] == len(request.token_ids), "this KV is of another prompt"
                first = self.firsts[session]
                generated = []
                if not self.samples_first and first is not None:
                    generated = list(first.token_ids)
                    yield first
            for _ in range(request.stop.max_tokens - len(generated)):
                await asyncio.sleep(0)
                if aborted.is_set():
                    yield Delta([], finish=FinishReason.ABORT)
                    return
                delta = self._next(session, generated, request)
                generated += delta.token_ids
                yield delta
                if delta.finish is not None:
                    return
        finally:
            del self.running[request.request_id]
            if session is not None:
                self._free(session)

    @hookimpl
    async def prefill(self, request: EngineRequest, reservation: KvReservation | None) -> PrefillResult:
        self.calls["prefill"] += 1
        if request.token_ids[0] == POISON:
            raise RequestRejected("This engine does not like 13.", param="prompt")
        aborted = self.running[request.request_id] = asyncio.Event()
        meets = f"meet-{self.worker_id}-{request.request_id}" in self.fabric.meetings or self._meets()
        session = self._allocate(len(request.token_ids), request.request_id if meets else None)
        try:
            self._write(session, request.token_ids, 0)
            await self._gate("prefill", aborted)
            if aborted.is_set():
                return PrefillResult(session, Delta([], finish=FinishReason.ABORT))
            first = self._next(session, [], request)
            first.cached_tokens = 2
            self.firsts[session] = first
            if meets:
                meeting = self._meeting(request.request_id)
                stopped = asyncio.create_task(aborted.wait())
                await asyncio.wait({meeting, stopped}, return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
                if aborted.is_set():
                    return PrefillResult(session, Delta([], finish=FinishReason.ABORT))
                peer, blocks, arrived = meeting.result()
                await self._copy(session, peer, blocks)
                peer.firsts_in_flight = first
                arrived.set()
            elif reservation is not None:
                await self._push(session, reservation, blocks_from=0, blocks_to=len(self.sessions[session]) // 2)
            return PrefillResult(session, first)
        except BaseException:
            self._free(session)
            raise
        finally:
            del self.running[request.request_id]

    # KV.

    @hookimpl
    async def export_kv(self, session: str, reservation: KvReservation | None) -> KvTicket:
        self.calls["export"] += 1
        kind = Rendezvous.HANDSHAKE if self._meets() else Rendezvous.PULL if reservation is None else Rendezvous.PUSH
        await self.gates["export"].pass_()
        payload: dict[str, object] = {}
        if kind is Rendezvous.HANDSHAKE:
            self._meeting(session)
            payload = {"meet": f"meet-{self.worker_id}-{session}"}
        else:
            if session not in self.sessions:
                raise EngineError(f"no session {session}")
            payload = {"worker": self.worker_id, "blocks": self.sessions[session]}
            if reservation is not None:
                await self._push(session, reservation, blocks_from=len(self.sessions[session]) // 2, blocks_to=None)
        return KvTicket(
            engine="bytes",
            engine_version="1",
            fingerprint=FINGERPRINT | {"model": self.exports or self.model},
            session=session,
            worker_id=self.worker_id,
            rendezvous=kind,
            expires_in=self.lease,
            num_tokens=self.lengths.get(session, 0),
            canonical=True,
            payload=payload,
        )

    @hookimpl
    async def reserve_kv(self, request: EngineRequest) -> KvReservation:
        self.calls["reserve"] += 1
        await self.gates["reserve"].pass_()
        session = self._allocate(len(request.token_ids))
        payload = {"worker": self.worker_id, "blocks": self.sessions[session]}
        return KvReservation(session=session, num_tokens=len(request.token_ids), cached_tokens=0, payload=payload)

    @hookimpl
    async def import_kv(self, ticket: KvTicket, session: str) -> None:
        self.calls["import"] += 1
        assert ticket.expires_in > 0
        await self.gates["import"].pass_()
        mine = self.sessions[session]
        if ticket.rendezvous is Rendezvous.HANDSHAKE:
            arrived = asyncio.Event()
            self.fabric.meetings[ticket.payload["meet"]].set_result((self, mine, arrived))
            await arrived.wait()
            self.firsts[session] = None
        elif ticket.rendezvous is Rendezvous.PULL:
            peer = self.fabric.engines[ticket.payload["worker"]]
            for source, target in zip(ticket.payload["blocks"], mine, strict=True):
                await self.gates["read"].pass_()
                self.pool[target] = peer.pool[source]
            self.firsts[session] = ticket.first
        else:
            self.firsts[session] = ticket.first

    @hookimpl
    async def release_kv(self, session: str) -> None:
        self.calls["release"] += 1
        self._free(session)

    # Inside.

    firsts_in_flight: Delta | None = None

    def _meets(self) -> bool:
        return self.rendezvous == {Rendezvous.HANDSHAKE}

    def _meeting(self, request_id: str) -> asyncio.Future[tuple[ByteEngine, list[int], asyncio.Event]]:
        name = f"meet-{self.worker_id}-{request_id}"
        if name not in self.fabric.meetings:
            self.fabric.meetings[name] = asyncio.get_running_loop().create_future()
        return self.fabric.meetings[name]

    async def _gate(self, name: str, aborted: asyncio.Event) -> None:
        gate = asyncio.create_task(self.gates[name].pass_())
        stopped = asyncio.create_task(aborted.wait())
        try:
            await asyncio.wait({gate, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if gate.done():
                gate.result()
        finally:
            gate.cancel()
            stopped.cancel()

    async def _push(self, session: str, reservation: KvReservation, *, blocks_from: int, blocks_to: int | None) -> None:
        assert reservation.expires_in is not None
        assert reservation.expires_in > 0
        peer = self.fabric.engines[reservation.payload["worker"]]
        span = slice(blocks_from, blocks_to)
        for source, target in zip(self.sessions[session][span], reservation.payload["blocks"][span], strict=True):
            await self.gates["write"].pass_()
            peer.pool[target] = self.pool[source]

    async def _copy(self, session: str, peer: ByteEngine, blocks: list[int]) -> None:
        for source, target in zip(self.sessions[session], blocks, strict=True):
            await self.gates["write"].pass_()
            peer.pool[target] = self.pool[source]

    def _allocate(self, tokens: int, name: str | None = None) -> str:
        need = -(-tokens // BLOCK)
        if need > len(self.free):
            raise Overloaded(f"{need} blocks wanted, {len(self.free)} free")
        self.number += 1
        session = name or f"{self.worker_id}-kv{self.number}"
        self.sessions[session] = [self.free.pop() for _ in range(need)]
        self.lengths[session] = tokens
        return session

    def _write(self, session: str, tokens: list[int], start: int) -> None:
        for i, block in enumerate(self.sessions[session]):
            upto = bytes(str(tokens[: (i + 1) * BLOCK]), "ascii")
            self.pool[block] = hashlib.blake2b(upto, digest_size=16).digest()

    def _next(self, session: str, generated: list[int], request: EngineRequest) -> Delta:
        content = b"".join(self.pool[block] for block in self.sessions[session])
        digest = hashlib.blake2b(content + bytes(str(generated), "ascii")).digest()
        token = int.from_bytes(digest[:2], "big") % VOCABULARY
        if token == EOS:
            return Delta([token], finish=FinishReason.STOP, stop_token=token)
        finish = FinishReason.LENGTH if len(generated) + 1 >= request.stop.max_tokens else None
        return Delta([token], finish=finish)

    def _free(self, session: str) -> None:
        for block in self.sessions.pop(session, []):
            self.pool[block] = DEAD
            self.free.append(block)
        self.lengths.pop(session, None)
        self.firsts.pop(session, None)


def make_host(engine: ByteEngine, worker_id: str, role: Role) -> EngineHost:
    registry = EngineRegistry([])
    adapter = registry.add(lambda: engine, Source("bytes", "tests"))
    return EngineHost(adapter, EngineConfig(model="", worker_id=worker_id), role)
