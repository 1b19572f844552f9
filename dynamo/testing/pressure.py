"""Pressure: more requests than fit, in seats and in KV blocks, and an engine that is about to leave."""

from __future__ import annotations

import asyncio

import pytest

from dynamo import EngineDraining, EngineRequest
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.run import within
from dynamo.testing.target import Target


class Pressure(Conformance):
    """Rules about full engines, priorities and draining."""

    @rule()
    async def test_sizes_are_honoured(self, cramped: Target) -> None:
        """num_kv_blocks, max_model_len and max_num_seqs of the configuration are limits, not hints."""
        info, asked = cramped.host.info, cramped.host.config
        for field in ("num_kv_blocks", "max_model_len", "max_num_seqs"):
            limit, found = getattr(asked, field), getattr(info, field)
            assert limit is None or found <= limit, f"{field} is configured as {limit}, EngineInfo says {found}"

    @rule()
    async def test_full_cache_loses_nothing(self, cramped: Target) -> None:
        """When the KV cache overflows requests wait or are resumed, and each gets the tokens that it gets alone."""
        room = cramped.block_size * cramped.host.info.num_kv_blocks
        asked = [self._growing(cramped, room, i) for i in range(6)]
        alone = [(await cramped.complete(request)).tokens for request in asked]
        # Twice: from an empty prefix cache's point of view, and with all prompts at hand.
        for _ in range(2):
            runs = await cramped.together([self._growing(cramped, room, i) for i in range(6)])
            assert [run.tokens for run in runs] == alone
        await cramped.until_idle()

    @rule()
    async def test_large_among_small(self, cramped: Target) -> None:
        """A request that needs nearly the whole KV cache is served among small ones, and they beside it."""
        size = cramped.block_size
        longest = cramped.host.info.max_model_len
        asked = [cramped.ask(cramped.prompt(longest - 8, "large"), 8)]
        asked += [cramped.ask(cramped.prompt(2 * size + 1, f"small {i}"), 24) for i in range(8)]
        alone = [(await cramped.complete(request)).tokens for request in asked]
        for order in (asked, asked[::-1]):
            again = [cramped.ask(request.token_ids, request.stop.max_tokens) for request in order]
            expected = alone if order is asked else alone[::-1]
            assert [run.tokens for run in await cramped.together(again)] == expected

    @rule()
    async def test_more_requests_than_seats(self, cramped: Target) -> None:
        """Any number of requests at once are all served."""
        asked = [(cramped.prompt(4 + i % 9, f"crowd {i}"), 3 + i % 7) for i in range(40)]
        runs = await cramped.together(cramped.ask(prompt, count) for prompt, count in asked)
        assert [len(run.tokens) for run in runs] == [count for _, count in asked]

    @rule("priority")
    async def test_priority(self, cramped: Target) -> None:
        """Of the requests that wait the one with the largest priority is served first."""
        seats = cramped.host.info.max_num_seqs
        if not seats:
            pytest.skip(f"not applicable: engine '{self.kit.name}' has no limit to running requests")
        served: list[int] = []

        async def serve(priority: int, key: str) -> None:
            async with cramped.stream(cramped.ask(cramped.prompt(5, key), 12, priority=priority)) as stream:
                await stream.next()
                served.append(priority)
                await stream.finish()

        blockers = [asyncio.create_task(serve(9, f"blocker {i}")) for i in range(seats)]
        await cramped.until(lambda: cramped.load().running == seats, f"{seats} requests run")
        waiting = [asyncio.create_task(serve(0, f"patient {i}")) for i in range(3 * seats)]
        await cramped.until(lambda: cramped.load().waiting == 3 * seats or served[seats:] != [], "the others wait")
        waiting.append(asyncio.create_task(serve(5, "urgent")))
        await asyncio.gather(*blockers, *waiting)
        before = [priority for priority in served if priority != 9].index(5)
        assert before <= seats, f"{before} requests of priority 0 were served before the waiting one of priority 5"

    @rule()
    async def test_drain(self, target: Target) -> None:
        """A draining engine refuses new requests with EngineDraining; drain returns when the others have finished."""
        prompt = target.prompt(8, "drained")
        plain = (await target.generate(prompt, 48)).tokens
        async with self.kit.fresh() as engine:
            streams = [engine.stream(engine.ask(prompt, 48)) for _ in range(2)]
            for stream in streams:
                await stream.next()
            reading = [asyncio.create_task(stream.finish()) for stream in streams]
            draining = asyncio.create_task(engine.host.drain())
            await asyncio.sleep(0)
            with pytest.raises(EngineDraining):
                await engine.generate(prompt, 1)
            await within(self.step_timeout, draining, "drain to return, the running requests having finished")
            load = engine.load()
            assert not load.running + load.waiting, f"drain returned before the running requests had finished: {load}"
            assert [run.tokens for run in await asyncio.gather(*reading)] == [plain, plain]
            await within(self.step_timeout, engine.host.drain(), "drain, called again")
            with pytest.raises(EngineDraining):
                await engine.generate(prompt, 1)
            await engine.until_idle()

    def _growing(self, target: Target, room: int, number: int) -> EngineRequest:
        """A request that begins small and ends with half of the cache; every other one is seeded."""
        prompt = target.prompt(room // 8, f"growing {number}")
        count = min(room // 2, target.host.info.max_model_len) - len(prompt)
        seeded = {"temperature", "seed"} <= target.can.sampling and number % 2
        return target.ask(prompt, count, **({"temperature": 1.0, "seed": number} if seeded else {}))
