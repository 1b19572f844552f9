"""Engines that break one rule each: the torch engine with something gone wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from typing import Any

import msgspec

from dynamo import (
    Delta,
    EngineConfig,
    EngineDead,
    EngineDescription,
    EngineInfo,
    EngineRequest,
    KvEventBatch,
    KvRemoved,
    Load,
    Role,
    SamplingParams,
    hookimpl,
)
from engines.torch import TorchEngine

replace = msgspec.structs.replace


class Faulty(TorchEngine):
    """The torch engine, with a door on each side of its stream."""

    def alter(self, request: EngineRequest) -> EngineRequest:
        """The request that the engine gets."""
        return request

    def twist(self, request: EngineRequest, number: int, delta: Delta) -> Iterator[Delta]:
        """What becomes of a delta."""
        yield delta

    @hookimpl
    async def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:
        number = 0
        async with aclosing(TorchEngine.decode(self, self.alter(request), kv)) as stream:
            async for delta in stream:
                for twisted in self.twist(request, number, delta):
                    yield twisted
                    number += 1


def altering(alter: Callable[[EngineRequest], EngineRequest]) -> type[Faulty]:
    """An engine that gets other requests than it was sent."""
    return type("Altering", (Faulty,), {"alter": lambda self, request: alter(request)})


def twisting(twist: Callable[[EngineRequest, int, Delta], list[Delta]]) -> type[Faulty]:
    """An engine whose deltas are changed on the way out."""
    return type("Twisting", (Faulty,), {"twist": lambda self, *args: iter(twist(*args))})


def ignoring(field: str) -> type[Faulty]:
    """An engine that ignores a field, of sampling, stop conditions or the request."""
    plain = SamplingParams()

    def alter(request: EngineRequest) -> EngineRequest:
        if hasattr(plain, field):
            return replace(request, sampling=replace(request.sampling, **{field: getattr(plain, field)}))
        default: Any = {"stop_token_ids": (), "min_tokens": 0, "ignore_eos": False}
        if field in default:
            return replace(request, stop=replace(request.stop, **{field: default[field]}))
        return replace(request, **{field: {"prior_tokens": 0, "priority": 0}.get(field)})

    return altering(alter)


class MinusSign(Faulty):
    def twist(self, request: EngineRequest, number: int, delta: Delta) -> Iterator[Delta]:
        """Adds to every log-probability when the temperature is not 0: it shows."""
        if delta.logprobs and request.sampling.temperature:
            for entry in delta.logprobs:
                entry.top[:] = [(token, value * request.sampling.temperature) for token, value in entry.top]
        yield delta


class Forgetful(Faulty):
    @hookimpl
    async def abort(self, request_id: str) -> None:
        """Does nothing."""


class Deaf(Faulty):
    """Goes on when the stream is closed."""

    @hookimpl
    async def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:
        queue: asyncio.Queue[Delta] = asyncio.Queue()

        async def pump() -> None:
            with suppress(EngineDead):
                async for delta in TorchEngine.decode(self, request, kv):
                    queue.put_nowait(delta)

        task = asyncio.create_task(pump())
        while True:
            delta = await queue.get()
            yield delta
            if delta.finish:
                break
        await task


class Moody(Faulty):
    """Answers differently when it is busy."""

    def twist(self, request: EngineRequest, number: int, delta: Delta) -> Iterator[Delta]:
        if sum(rank.running for rank in self.load()) > 1:
            delta.token_ids = [token ^ 1 for token in delta.token_ids]
        yield delta


class Impatient(Faulty):
    """Answers differently when requests wait or were preempted."""

    def twist(self, request: EngineRequest, number: int, delta: Delta) -> Iterator[Delta]:
        if sum(rank.waiting for rank in self.load()):
            delta.token_ids = [token ^ 1 for token in delta.token_ids]
        yield delta


class Blocking(Faulty):
    def alter(self, request: EngineRequest) -> EngineRequest:
        time.sleep(1.5)  # the fault
        return request


class Stuck(Faulty):
    def alter(self, request: EngineRequest) -> EngineRequest:
        time.sleep(4.0)  # the fault
        return request


class Silent(Faulty):
    @hookimpl
    async def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:
        await asyncio.Event().wait()
        yield Delta([])


class Miscounting(Faulty):
    """States another load."""

    change: Callable[[Load], Load]

    @hookimpl
    def load(self) -> list[Load]:
        return [type(self).change(rank) for rank in TorchEngine.load(self)]


def miscounting(change: Callable[[Load], Load]) -> type[Faulty]:
    return type("Miscounting", (Miscounting,), {"change": staticmethod(change)})


class Leaky(Faulty):
    """Every abort leaves something."""

    leaked = 0

    @hookimpl
    async def abort(self, request_id: str) -> None:
        self.leaked += 1
        await TorchEngine.abort(self, request_id)

    @hookimpl
    def load(self) -> list[Load]:
        (load,) = TorchEngine.load(self)
        return [replace(load, kv_blocks_used=load.kv_blocks_used + self.leaked)]


class Rushing(Faulty):
    @hookimpl
    async def drain(self) -> None:
        """Returns at once."""


class Fickle(Faulty):
    @hookimpl
    def describe_engine(self) -> EngineDescription:
        return replace(TorchEngine().describe_engine(), summary=f"Started at {time.monotonic()}")


class Littering(Faulty):
    """Leaves a task running when it is stopped."""

    @hookimpl
    async def start_engine(self, config: EngineConfig, role: Role) -> EngineInfo:
        self.litter = asyncio.create_task(asyncio.Event().wait())
        return await TorchEngine.start_engine(self, config, role)


class Fragile(Faulty):
    @hookimpl
    async def stop_engine(self) -> None:
        await self._thread.stop()  # type: ignore[union-attr]


class Lax(Faulty):
    """Takes any argument."""

    @hookimpl
    async def start_engine(self, config: EngineConfig, role: Role) -> EngineInfo:
        return await TorchEngine.start_engine(self, replace(config, engine_args={}), role)


class Generous(Faulty):
    @hookimpl
    async def start_engine(self, config: EngineConfig, role: Role) -> EngineInfo:
        info = await TorchEngine.start_engine(self, config, role)
        return replace(info, max_model_len=info.block_size * info.num_kv_blocks + 1)


class Sick(Faulty):
    @hookimpl
    async def check_health(self) -> None:
        if sum(rank.running for rank in self.load()):
            raise EngineDead("busy")


class Events(Faulty):
    """Changes its KV events."""

    change: Callable[[KvEventBatch], KvEventBatch]

    @hookimpl
    async def kv_events(self) -> AsyncIterator[KvEventBatch]:
        async for batch in TorchEngine.kv_events(self):
            yield type(self).change(batch)


def telling(change: Callable[[KvEventBatch], KvEventBatch]) -> type[Faulty]:
    return type("Telling", (Events,), {"change": staticmethod(change)})


class Amnesic(Faulty):
    """Tells a late listener nothing of before."""

    @hookimpl
    async def kv_events(self) -> AsyncIterator[KvEventBatch]:
        async for batch in TorchEngine.kv_events(self):
            yield replace(batch, events=[]) if batch.sequence == 0 else batch


def without_removals(batch: KvEventBatch) -> KvEventBatch:
    return replace(batch, events=[event for event in batch.events if not isinstance(event, KvRemoved)])


def without_salt(batch: KvEventBatch) -> KvEventBatch:
    return replace(batch, events=[replace(e, cache_salt=None) if hasattr(e, "cache_salt") else e for e in batch.events])
