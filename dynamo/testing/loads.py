"""Load: the figures are what runs, what waits, and what is held."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.target import Target


class Loads(Conformance):
    """Rules about `load`, and about the event loop that everything shares. Every test ends with zero load."""

    @rule()
    async def test_load_counts_requests(self, target: Target) -> None:
        """running and waiting together are the requests that have not finished."""
        assert len(target.host.load()) == target.host.info.data_parallel_size, "load() has one entry a rank"
        seats = target.host.info.max_num_seqs or 5
        for count in {1, min(3, seats), min(5, seats)}:
            async with contextlib.AsyncExitStack() as stack:
                for i in range(count):
                    prompt = target.prompt(5, f"counted {i}")
                    stream = await stack.enter_async_context(target.stream(target.ask(prompt, target.room(prompt))))
                    await stream.next()
                await _until_open(target, count)
            await target.until_idle()

    @rule()
    async def test_load_counts_waiting(self, cramped: Target) -> None:
        """Requests beyond max_num_seqs wait, and never more than max_num_seqs run."""
        seats = cramped.host.info.max_num_seqs
        if not seats:
            pytest.skip(f"not applicable: engine '{self.kit.name}' has no limit to running requests")
        prompts = [cramped.prompt(5, f"seated {i}") for i in range(seats + 3)]
        async with cramped.background(cramped.ask(prompt, cramped.room(prompt)) for prompt in prompts):
            await _until_open(cramped, seats + 3)
            load = cramped.load()
            assert load.running <= seats, f"{load.running} run, max_num_seqs is {seats}"
            assert load.waiting >= 3

    @rule()
    async def test_load_counts_blocks(self, target: Target) -> None:
        """A running request uses the blocks of its tokens; the total does not change; idle, none is used."""
        size, info = target.block_size, target.host.info
        total = info.num_kv_blocks * info.data_parallel_size
        await target.until_idle()
        assert target.load().kv_blocks_total == total
        prompt = target.prompt(4 * size + 1, "blocks")
        async with target.stream(target.ask(prompt, target.room(prompt))) as stream:
            await stream.next()
            await target.until(lambda: target.load().kv_blocks_used >= 5, "the prompt's five blocks are used")
            load, most = target.load(), -(-(len(prompt) + target.room(prompt)) // size) + 1
            assert load.kv_blocks_used <= most, f"{load.kv_blocks_used} blocks are used, {most} hold the whole request"
            assert load.kv_blocks_total == total
        await target.until_idle()

    @rule()
    async def test_event_loop_stays_free(self, target: Target) -> None:
        """No hook blocks the event loop: others keep running while a long prompt is computed."""
        prompt = target.prompt(target.host.info.max_model_len - 8, "blocking")
        async with target.background([target.ask(prompt, 8)]) as (task,):
            longest, last = 0.0, time.monotonic()
            while not task.done():
                await asyncio.sleep(0.001)
                now = time.monotonic()
                longest, last = max(longest, now - last), now
        assert longest < self.stall_limit, f"the event loop stood still for {longest:.2f} s"


async def _until_open(target: Target, count: int) -> None:
    def shown() -> bool:
        load = target.load()
        return load.running + load.waiting == count

    await target.until(shown, f"the load shows {count} requests, running or waiting")
