"""Prefix caching: what is reused, and that KV events tell exactly that."""

from __future__ import annotations

import asyncio
import random

from dynamo import EngineRequest
from dynamo.testing.cache import CacheMirror
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.run import within
from dynamo.testing.target import Target


class Caching(Conformance):
    """Rules about `Delta.cached_tokens` and `kv_events`."""

    @rule("prefix_caching")
    async def test_repeated_prompt(self, target: Target) -> None:
        """Of a prompt that was computed before all whole blocks are reused, and of a new one none."""
        size = target.block_size
        prompt = target.prompt(3 * size + 1, "repeated")
        for expected in (0, 3 * size):
            assert (await target.generate(prompt, 2, cache_salt="repeated")).cached_tokens == expected

    @rule("prefix_caching")
    async def test_shared_prefix(self, target: Target) -> None:
        """Prompts share the whole blocks at their beginning, and nothing after the first difference."""
        size = target.block_size
        prefix, tail = target.prompt(2 * size, "prefix"), target.prompt(2 * size + 1, "tail")
        other = target.prompt(2 * size + 1, "other tail")
        expected = (
            (prefix + tail, 0, "nothing was computed before"),
            (prefix + other, 2 * size, "the prefix was"),
            ([*prefix[:-1], other[0], *tail], size, "the second block differs in its last token"),
            (tail + prefix, 0, "the same blocks at another place are other blocks"),
        )
        for prompt, cached, why in expected:
            assert (await target.generate(prompt, 1, cache_salt="shared")).cached_tokens == cached, why

    @rule("prefix_caching")
    async def test_last_token_is_computed(self, target: Target) -> None:
        """A prompt of whole blocks that are all cached still has its last token computed, and answers alike."""
        size = target.block_size
        prompt = target.prompt(2 * size, "whole blocks")
        first = await target.generate(prompt, 8, cache_salt="whole")
        again = await target.generate(prompt, 8, cache_salt="whole")
        assert again.tokens == first.tokens
        assert again.cached_tokens is not None
        assert len(prompt) - size <= again.cached_tokens < len(prompt)

    @rule("prefix_caching")
    async def test_conversation(self, target: Target) -> None:
        """The next turn of a conversation reuses prompt and answer of the one before, up to the last whole block."""
        size = target.block_size
        prompt = target.prompt(2 * size + 1, "turn")
        answer = (await target.generate(prompt, 2 * size, cache_salt="turns")).tokens
        turn = prompt + answer + target.prompt(size, "next turn")
        cached = (await target.generate(turn, 1, cache_salt="turns")).cached_tokens
        # The last generated token was never fed back, so its KV was not computed.
        assert cached == (len(prompt) + len(answer) - 1) // size * size

    @rule("prefix_caching")
    async def test_salt_separates(self, target: Target) -> None:
        """Requests reuse each other's blocks only within the same cache salt."""
        size = target.block_size
        prompt = target.prompt(2 * size + 1, "salted")
        for salt in ("alice", "bob"):
            for expected in (0, 2 * size):
                assert (await target.generate(prompt, 1, cache_salt=salt)).cached_tokens == expected, f"salt {salt}"
        unsalted = await target.generate(prompt, 1)
        assert unsalted.cached_tokens is not None
        assert unsalted.cached_tokens < 2 * size, "a request without a salt reused salted blocks"

    @rule("prefix_caching")
    async def test_caching_can_be_turned_off(self, target: Target) -> None:
        """With enable_prefix_caching off nothing is reused, and answers are the same."""
        size = target.block_size
        prompt = target.prompt(2 * size + 1, "off")
        plain = (await target.generate(prompt, 4)).tokens
        async with self.kit.fresh(enable_prefix_caching=False) as engine:
            for _ in range(2):
                run = await engine.generate(prompt, 4)
                assert (run.tokens, run.cached_tokens or 0) == (plain, 0)
            assert not engine.mirror or not len(engine.mirror), "events tell of blocks that cannot be reused"

    @rule("kv_events")
    async def test_events_tell_what_is_reused(self, target: Target) -> None:
        """A prompt reuses exactly the blocks that events say can be reused, over a tree of prompts and salts."""
        draw = random.Random(1)
        for number in range(24):
            salt = draw.choice((None, None, "a"))
            await self._probe(target, self._branch(target, draw, 3, f"tree {number}", salt))

    @rule("kv_events")
    async def test_events_of_a_batch(self, target: Target) -> None:
        """Events stay true when prompts with common beginnings are computed at the same time."""
        draw = random.Random(2)
        requests = [self._branch(target, draw, 4, f"batch {i}") for i in range(12)]
        await target.together(requests)
        for request in requests:
            await self._probe(target, target.ask(request.token_ids, 1))

    @rule("kv_events")
    async def test_eviction(self, cramped: Target) -> None:
        """When the cache is full blocks are evicted, and events tell which: reuse is still exactly what they say."""
        draw, capacity = random.Random(3), cramped.host.info.num_kv_blocks
        mirror = cramped.events()
        before = mirror.removed
        asked: list[EngineRequest] = []
        while sum(len(request.token_ids) for request in asked) < 3 * capacity * cramped.block_size:
            asked.append(self._branch(cramped, draw, 3, f"evicted {len(asked)}"))
            await self._probe(cramped, asked[-1])
            assert len(mirror) <= capacity, f"events tell of {len(mirror)} blocks, the cache has {capacity}"
        assert mirror.removed > before, "three times the cache was computed and no event told of a removal"
        for request in asked[-1:-6:-1] + asked[:4]:
            await self._probe(cramped, cramped.ask(request.token_ids, 1))

    @rule("kv_events")
    async def test_late_listener(self, target: Target) -> None:
        """The first events that a listener gets describe the cache as it is then; the stream ends with the engine."""
        prompt = target.prompt(3 * target.block_size + 1, "late")
        async with self.kit.fresh(follow=False) as engine:
            await engine.generate(prompt, 2)
            engine.mirror = CacheMirror(engine.block_size)
            following = asyncio.create_task(engine.follow(engine.mirror))
            await engine.until_cached(engine.ask(prompt))
            assert (await engine.generate(prompt, 1)).cached_tokens == 3 * engine.block_size
            await engine.stop()
            await within(self.step_timeout, following, "the stream of KV events to end with the engine")

    async def _probe(self, target: Target, request: EngineRequest) -> None:
        """Compares what events promise for a request with what the engine reuses."""
        promised = target.events().reusable(request)
        run = await target.complete(request)
        assert run.cached_tokens == promised, (
            f"{run.cached_tokens} of {len(request.token_ids)} prompt tokens were reused; events promised {promised}"
        )
        await target.until_idle()
        await target.until_cached(request)

    def _branch(
        self, target: Target, draw: random.Random, depth: int, key: str, salt: str | None = None
    ) -> EngineRequest:
        """A prompt along a random branch of a tree whose nodes are a little more than a block long."""
        length = target.block_size + max(1, target.block_size // 3)
        prompt: list[int] = []
        for level in range(depth):
            prompt += target.prompt(length, f"{level} {draw.randrange(3)}")
        return target.ask(prompt + target.prompt(2, key), 2, cache_salt=salt)
