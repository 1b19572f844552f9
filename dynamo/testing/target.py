"""One started engine under test, with the requests and waits that the rules are written in."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
import pytest

from dynamo import (
    Capabilities,
    EngineHost,
    EngineRequest,
    Load,
    SamplingParams,
    StopConditions,
)
from dynamo.testing.cache import CacheMirror
from dynamo.testing.run import Run, Stream, within

T = TypeVar("T")

_STOP_FIELDS = frozenset(StopConditions.__struct_fields__)
_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)
_ids = iter(range(1 << 62))


class Target:
    """A host that has been started, followed by a mirror of its prefix cache if it tells KV events.

    `async with Target(host, ...) as engine:` starts and stops it.
    """

    def __init__(self, host: EngineHost, *, step_timeout: float, start_timeout: float, follow: bool = True) -> None:
        """`follow` false leaves the stream of KV events to the test."""
        self.host = host
        self.step_timeout = step_timeout
        self.mirror: CacheMirror | None = None
        self._start_timeout = start_timeout
        self._follow = follow
        self._follower: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        info = await within(self._start_timeout, self.host.start(), "the engine to start (see start_timeout)")
        if self._follow and self.can.kv_events:
            self.mirror = CacheMirror(info.block_size)
            self._follower = asyncio.create_task(self.follow(self.mirror))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stops the engine, then whatever still follows its events."""
        try:
            await within(self._start_timeout, self.host.stop(), "the engine to stop")
        finally:
            if self._follower is not None:
                self._follower.cancel()
                with contextlib.suppress(asyncio.CancelledError, AssertionError):
                    await self._follower

    @property
    def can(self) -> Capabilities:
        """What the adapter declares."""
        return self.host.description.capabilities

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding has to be asked for; an engine without 'temperature' is deterministic."""
        return "temperature" in self.can.sampling

    def ask(self, prompt: list[int], max_tokens: int = 16, **fields: Any) -> EngineRequest:
        """A request with fields of sampling, stop conditions and request; greedy and ignoring eos unless said."""
        stop = {"ignore_eos": True} | {k: fields.pop(k) for k in _STOP_FIELDS & fields.keys()}
        sampling = {k: fields.pop(k) for k in _SAMPLING_FIELDS & fields.keys()}
        if self.greedy:
            sampling.setdefault("temperature", 0.0)
        return EngineRequest(
            request_id=f"conformance-{next(_ids)}",
            token_ids=prompt,
            stop=StopConditions(max_tokens=max_tokens, **stop),
            sampling=SamplingParams(**sampling),
            **fields,
        )

    def renamed(self, request: EngineRequest, **changes: Any) -> EngineRequest:
        """The same request once more, under an id of its own."""
        return msgspec.structs.replace(request, request_id=f"conformance-{next(_ids)}", **changes)

    def prompt(self, length: int, key: str) -> list[int]:
        """`length` ordinary token ids, always the same for a key and shared with no other key."""
        info = self.host.info
        draw = random.Random(key)
        ordinary = [t for t in range(info.vocab_size) if t not in info.eos_token_ids]
        return draw.choices(ordinary, k=length)

    def room(self, prompt: list[int], most: int = 4096) -> int:
        """Tokens that can follow the prompt: a long answer, for requests that are to be interrupted."""
        return min(self.host.info.max_model_len - len(prompt), most)

    def stream(self, request: EngineRequest) -> Stream:
        """The request's stream, not begun."""
        return Stream(self.host, request, self.step_timeout)

    async def generate(self, prompt: list[int], max_tokens: int = 16, **fields: Any) -> Run:
        """Asks and reads to the end."""
        return await self.complete(self.ask(prompt, max_tokens, **fields))

    async def complete(self, request: EngineRequest) -> Run:
        """Reads the request's stream to the end."""
        async with self.stream(request) as stream:
            return await stream.finish()

    async def together(self, requests: Iterable[EngineRequest]) -> list[Run]:
        """All at once, in one batch as far as the engine makes one."""
        async with self.background(requests) as tasks:
            return await asyncio.gather(*tasks)

    @contextlib.asynccontextmanager
    async def background(self, requests: Iterable[EngineRequest]) -> AsyncIterator[list[asyncio.Task[Run]]]:
        """Requests that run while the block does, and are cancelled at its end. Raises what one of them raised."""
        tasks = [asyncio.create_task(self.complete(request)) for request in requests]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def load(self) -> Load:
        """The sum over the ranks."""
        ranks = self.host.load()
        return Load(
            running=sum(rank.running for rank in ranks),
            waiting=sum(rank.waiting for rank in ranks),
            kv_blocks_used=sum(rank.kv_blocks_used for rank in ranks),
            kv_blocks_total=sum(rank.kv_blocks_total for rank in ranks),
            tokens_in_flight=sum(rank.tokens_in_flight for rank in ranks),
        )

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Returns once `holds()`. Raises `AssertionError` after `step_timeout` seconds, with the load as it is then."""
        deadline = time.monotonic() + self.step_timeout
        turns = 0
        while not holds():
            self.check_follower()
            assert time.monotonic() < deadline, (
                f"waited {self.step_timeout:g} s until {what}; the load is {self.load()}"
            )
            turns += 1
            # Look at every turn of the loop first: fast engines are busy for milliseconds only.
            await asyncio.sleep(0 if turns < 200 else 0.005)

    async def until_idle(self) -> None:
        """Returns once nothing is on the engine. Raises `AssertionError` when something stays."""

        def idle() -> bool:
            load = self.load()
            return not (load.running or load.waiting or load.kv_blocks_used or load.tokens_in_flight)

        await self.until(idle, "running, waiting, kv_blocks_used and tokens_in_flight are 0: something is not freed")

    async def until_cached(self, request: EngineRequest) -> None:
        """Returns once events have told of every whole block of the prompt, hence of all that happened before."""
        mirror = self.events()
        size = mirror.block_size
        whole = (len(request.token_ids) - 1) // size * size
        await self.until(lambda: mirror.reusable(request) == whole, "KV events tell of all blocks of a computed prompt")

    def events(self) -> CacheMirror:
        """The mirror of the prefix cache."""
        assert self.mirror is not None, "the engine declares no KV events"
        self.check_follower()
        return self.mirror

    def check_follower(self) -> None:
        """Raises what was wrong with the KV events, as soon as something was."""
        if self._follower is not None and self._follower.done() and not self._follower.cancelled():
            self._follower.result()

    async def check_integrity(self) -> None:
        """Lets an adapter that has a coroutine `check_integrity` look at its own books; it raises what is wrong."""
        check = getattr(self.host.instance, "check_integrity", None)
        if check is not None:
            await within(self.step_timeout, check(), "check_integrity")

    async def follow(self, mirror: CacheMirror) -> None:
        """Applies events to `mirror` until the stream ends."""
        stream = self.host.kv_events()
        assert stream is not None
        async for batch in stream:
            if batch.data_parallel_rank == 0:
                mirror.apply(batch)

    @property
    def block_size(self) -> int:
        """Tokens in a KV block; skips the test for an engine without a KV cache."""
        if not self.host.info.block_size:
            pytest.skip(f"not applicable: engine '{self.host.description.name}' has no KV cache")
        return self.host.info.block_size
