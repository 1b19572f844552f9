"""A deployment for tests: decode and prefill workers of byte engines, on a local queue and wire or on NATS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from core.kv.ticket import TicketKey
from core.messages import Delta, EngineRequest, FinishReason, Rendezvous, Role, StopConditions
from core.prefill.decode_side import DecodeSide
from core.prefill.local_queue import LocalQueue
from core.prefill.prefill_side import PrefillSide
from core.prefill.settings import DisaggSettings
from core.prefill.wire import LocalWire
from tests.prefill.byte_engine import ByteEngine, Fabric, make_host

SECRET = "a secret of tests, long enough"


def ask(name: str, *tokens: int, max_tokens: int = 6) -> EngineRequest:
    prompt = list(tokens) or [hash(name) % 100 + 20, *range(1, 15)]
    return EngineRequest(request_id=name, token_ids=prompt, stop=StopConditions(max_tokens=max_tokens))


class House:
    """`async with House(...)`; at the end everything must be released."""

    def __init__(
        self,
        kind: Rendezvous = Rendezvous.PULL,
        *,
        decode: int = 1,
        prefill: int = 1,
        blocks: int = 64,
        samples_first: bool = False,
        wire=None,
        queue=None,
        **settings: object,
    ) -> None:
        self.kind = kind
        self.settings = DisaggSettings.of({"remote-prefill": True, "stop_timeout": 1.0, **settings})
        self.fabric = Fabric()
        self.wire = wire or LocalWire()
        self.queue = queue or LocalQueue(self.settings.queue)
        self.decoders: list[DecodeSide] = []
        self.prefillers: list[PrefillSide] = []
        self.engines: dict[str, ByteEngine] = {}
        self._counts = decode, prefill
        self._blocks = blocks
        self._samples_first = samples_first
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> House:
        for i in range(self._counts[0]):
            await self.add_decoder(f"d{i}")
        for i in range(self._counts[1]):
            await self.add_prefiller(f"p{i}")
        return self

    async def __aexit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                await self.quiet()
        finally:
            for side in (*self.decoders, *self.prefillers):
                await side.close()
            await self._stack.aclose()
        if kind is None:
            self.check_released()

    async def _host(self, name: str, role: Role, kind: Rendezvous | None = None, model: str = "bytes"):
        kinds = frozenset({kind or self.kind})
        engine = ByteEngine(self.fabric, kinds, self._blocks, samples_first=self._samples_first)
        engine.model = model
        self.engines[name] = engine
        return await self._stack.enter_async_context(make_host(engine, name, role))

    async def add_decoder(self, name: str) -> DecodeSide:
        host = await self._host(name, Role.DECODE)
        side = DecodeSide(host, self.queue, self.wire, self.settings, worker_id=name, key=TicketKey(SECRET))
        await side.start()
        self.decoders.append(side)
        return side

    async def add_prefiller(
        self, name: str, *, secret: str = SECRET, kind: Rendezvous | None = None, model: str = "bytes"
    ) -> PrefillSide:
        host = await self._host(name, Role.PREFILL, kind, model)
        side = PrefillSide(host, self.queue, self.wire, self.settings, worker_id=name, key=TicketKey(secret))
        await side.start()
        self.prefillers.append(side)
        return side

    async def kill_prefiller(self, index: int) -> None:
        """The process dies: nothing that it holds or does remains, and nobody is told."""
        side = self.prefillers.pop(index)
        await self.wire.withdraw(side.address)
        loop, side._loop = side._loop, None
        tasks = [loop, *side._running, *side._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await side._taker.lose()
        engine = self.engines[side.holder.worker_id]
        for session in list(engine.sessions):
            engine._free(session)
        if side.sessions._expiry is not None:
            side.sessions._expiry.cancel()

    async def expected(self, request: EngineRequest) -> list[int]:
        """What an aggregated engine says."""
        engine = ByteEngine(Fabric(), frozenset({self.kind}), 64, samples_first=False)
        async with make_host(engine, "lone", Role.AGGREGATED) as host:
            return [token async for delta in host.decode(request) for token in delta.token_ids]

    async def say(
        self, request: EngineRequest, side: DecodeSide | None = None
    ) -> tuple[list[int], FinishReason | None]:
        """The tokens and the finish of a whole stream, which must have exactly one end."""
        tokens: list[int] = []
        finishes: list[FinishReason] = []
        async for delta in self.stream(request, side):
            assert not finishes, "a delta after the end"
            tokens += delta.token_ids
            if delta.finish is not None:
                finishes.append(delta.finish)
        assert len(finishes) == 1
        return tokens, finishes[0]

    def stream(self, request: EngineRequest, side: DecodeSide | None = None) -> AsyncIterator[Delta]:
        async def run() -> AsyncIterator[Delta]:
            decoder = side or self.decoders[0]
            decision = await decoder.decide(request)
            async for delta in decoder.decode(request, decision):
                yield delta

        return run()

    async def quiet(self) -> None:
        """Wait until nobody has anything to do."""
        async with asyncio.timeout(20):
            while True:
                for side in self.decoders:
                    await side.settled()
                if not any(side._running or side._tasks for side in self.prefillers):
                    break
                await asyncio.sleep(0.01)
            for side in self.prefillers:
                await side.sessions.freed()

    def check_released(self) -> None:
        """Every party has let go of everything, and every session ended in exactly one way."""
        for name, engine in self.engines.items():
            assert engine.sessions == {}, f"{name} still holds {engine.sessions}"
            assert len(engine.free) == len(engine.pool), f"{name} has lost blocks"
        for side in (*self.decoders, *self.prefillers):
            side.check_integrity()
            counts = side.counts()
            assert counts.live == 0
            assert counts.opened == counts.imported + counts.released + counts.expired
        if isinstance(self.queue, LocalQueue):
            self.queue.check_integrity()
            assert self.queue._entries == {}, "tasks are left in the queue"
