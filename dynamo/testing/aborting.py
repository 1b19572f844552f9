"""Aborts: a request can be stopped at every stage and in every way, and then nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable

import pytest

from dynamo import EngineRequest, FinishReason, Overloaded
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.run import Run, within
from dynamo.testing.target import Target

STORM = 200
"""Requests of the cancellation storm."""
LONG = 160
"""Tokens of an answer that takes much longer than its interruption."""


class Aborting(Conformance):
    """Rules about `abort`, and about streams that are closed or cancelled."""

    @rule()
    async def test_abort_of_unknown_id(self, target: Target) -> None:
        """Aborting an id that nobody knows does nothing, to nobody."""
        prompt = target.prompt(6, "bystander")
        plain = (await target.generate(prompt)).tokens
        async with target.stream(target.ask(prompt)) as stream:
            await stream.next()
            for _ in range(2):
                await self._abort(target, "nobody-knows-this-id")
            assert (await stream.finish()).tokens == plain

    @rule()
    async def test_abort_before_the_stream_begins(self, target: Target) -> None:
        """Aborting a request whose stream was never asked for a delta keeps nothing from ending."""
        request = target.ask(target.prompt(6, "not begun"), 8)
        async with target.stream(request) as stream:
            await self._abort(target, request.request_id)
            run = await stream.finish()
            assert run.finish is FinishReason.ABORT or len(run.tokens) == 8

    @rule()
    async def test_abort_at_the_first_moment(self, target: Target) -> None:
        """A request can be aborted from the moment that its stream was first asked for a delta."""
        for turns in range(4):
            request = self._long(target, f"first moment {turns}")
            async with target.stream(request) as stream:
                reading = asyncio.create_task(stream.finish())
                for _ in range(turns + 1):
                    await asyncio.sleep(0)
                await self._abort(target, request.request_id)
                self._is_aborted(await reading)

    @rule()
    async def test_abort_while_waiting(self, cramped: Target) -> None:
        """A request that waits for a place is aborted without waiting for one."""
        seats = cramped.host.info.max_num_seqs
        if not seats:
            pytest.skip(f"not applicable: engine '{self.kit.name}' has no limit to running requests")
        blockers = [self._long(cramped, f"seat {i}") for i in range(seats + 2)]
        request = self._long(cramped, "waits")
        async with cramped.background(blockers), cramped.stream(request) as stream:
            await cramped.until(lambda: cramped.load().waiting > 0, "requests wait, there being more than max_num_seqs")
            reading = asyncio.create_task(stream.finish())
            await asyncio.sleep(0)
            await self._abort(cramped, request.request_id)
            self._is_aborted(await reading)
        await cramped.until_idle()

    @rule()
    async def test_abort_during_prefill(self, target: Target) -> None:
        """A request is aborted while its long prompt is computed."""
        request = target.ask(target.prompt(target.host.info.max_model_len - 64, "long prompt"), 64)
        async with target.stream(request) as stream:
            reading = asyncio.create_task(stream.finish())
            await target.until(lambda: reading.done() or _busy(target), "the request is on the engine")
            await self._abort(target, request.request_id)
            self._is_aborted(await reading)

    @rule()
    async def test_abort_while_generating(self, target: Target) -> None:
        """A running request ends with ABORT after the tokens so far, which are those of the undisturbed run."""
        request = self._long(target, "generating")
        plain = (await target.generate(request.token_ids, 8)).tokens
        async with target.stream(request) as stream:
            for _ in range(3):
                await stream.next()
            await self._abort(target, request.request_id)
            run = await stream.finish()
            self._is_aborted(run)
            assert run.tokens[:8] == plain[: len(run.tokens)]
        await target.until_idle()

    @rule()
    async def test_abort_twice_and_after_the_end(self, target: Target) -> None:
        """Aborting again, or after the request has finished, does nothing."""
        request = self._long(target, "twice")
        async with target.stream(request) as stream:
            await stream.next()
            await asyncio.gather(*(self._abort(target, request.request_id) for _ in range(3)))
            self._is_aborted(await stream.finish())
        finished = await target.generate(target.prompt(5, "finished"), 4)
        await self._abort(target, finished.request.request_id)
        assert (await target.generate(target.prompt(5, "finished"), 4)).tokens == finished.tokens

    @rule()
    async def test_closing_the_stream(self, target: Target) -> None:
        """Closing the iterator aborts the request: what it held is free long before it would have finished."""

        async def close(request: EngineRequest) -> None:
            async with target.stream(request) as stream:
                for _ in range(3):
                    await stream.next()

        await self._is_interrupted(target, close)

    @rule()
    async def test_cancelling_the_consumer(self, target: Target) -> None:
        """Cancelling the task that reads a stream aborts the request, before the first delta as after it."""
        for turns in (1, 3, 50):
            reading = asyncio.create_task(target.complete(self._long(target, f"cancelled {turns}")))
            for _ in range(turns):
                await asyncio.sleep(0)
            await _cancel([reading])
            await target.until_idle()

        async def cancel(request: EngineRequest) -> None:
            async with target.stream(request) as stream:
                await stream.next()
                reading = asyncio.create_task(stream.finish())
                await asyncio.sleep(0)
                await _cancel([reading])

        await self._is_interrupted(target, cancel)

    @rule()
    async def test_cancellation_storm(self, target: Target) -> None:
        """After many requests that end in every way at once, nothing is left and answers are right."""
        draw = random.Random(0)
        prompt = target.prompt(24, "after the storm")
        plain = (await target.generate(prompt, 12)).tokens
        tasks = [asyncio.create_task(self._whim(target, i, draw)) for i in range(STORM)]
        overloaded = sum(await asyncio.gather(*tasks))
        assert overloaded < STORM / 2, f"{overloaded} of {STORM} requests were refused as Overloaded"
        await target.until_idle()
        assert (await target.generate(prompt, 12)).tokens == plain

    async def _whim(self, target: Target, number: int, draw: random.Random) -> bool:
        """One request of the storm. Whether it was refused for want of room."""
        way = draw.choice(("complete", "abort", "close", "cancel"))
        deltas, length, count = draw.randrange(6), draw.randrange(1, 60), draw.randrange(1, 40)
        request = target.ask(target.prompt(length, f"storm {number % 17}"), count)
        async with target.stream(request) as stream:
            try:
                for _ in range(deltas):
                    await stream.next()
                    if stream.run.finish:
                        break
                if way == "cancel":
                    reading = asyncio.create_task(stream.finish())
                    for _ in range(draw.randrange(4)):
                        await asyncio.sleep(0)
                    await _cancel([reading])
                elif way != "close":
                    if way == "abort":
                        await self._abort(target, request.request_id)
                    run = await stream.finish()
                    assert run.finish is FinishReason.ABORT or len(run.tokens) == count
            except Overloaded:
                return True
        return False

    async def _abort(self, target: Target, request_id: str) -> None:
        await within(self.step_timeout, target.host.abort(request_id), f"abort of {request_id}")

    def _long(self, target: Target, key: str) -> EngineRequest:
        """A request that runs much longer than its abort takes."""
        prompt = target.prompt(6, key)
        return target.ask(prompt, target.room(prompt))

    async def _is_interrupted(self, target: Target, interrupt: Callable[[EngineRequest], Awaitable[None]]) -> None:
        """Compares the time until nothing is left after `interrupt` with the time of the whole answer."""
        prompt = target.prompt(6, "interrupted")
        whole, interrupted = [], []
        for _ in range(3):
            begin = time.monotonic()
            await target.generate(prompt, target.room(prompt, LONG))
            whole.append(time.monotonic() - begin)
            begin = time.monotonic()
            await interrupt(target.ask(prompt, target.room(prompt, LONG)))
            await target.until_idle()
            interrupted.append(time.monotonic() - begin)
        assert min(interrupted) < min(whole) / 2, (
            f"what an interrupted request held was free after {min(interrupted):.3f} s at best; it went on, "
            f"since its whole answer takes {min(whole):.3f} s"
        )

    def _is_aborted(self, run: Run) -> None:
        count, most = len(run.tokens), run.request.stop.max_tokens
        assert run.finish is FinishReason.ABORT, f"aborted, it ended with {run.finish} after {count} of {most} tokens"


def _busy(target: Target) -> bool:
    load = target.load()
    return load.running + load.waiting > 0


async def _cancel(tasks: list[asyncio.Task[Run]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
