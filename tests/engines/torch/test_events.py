"""KV events say exactly what can be reused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from core.messages import KvCleared, KvEventBatch, KvRemoved, KvStored
from tests.engines.torch.conftest import Engine, Running, prompt_of


class Listener:
    """Follows the events of an engine and knows what it has cached."""

    def __init__(self, running: Running) -> None:
        stream = running.host.kv_events()
        assert stream is not None
        self.stream = stream
        self.batches: list[KvEventBatch] = []
        self.blocks: dict[int, KvStored] = {}
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for batch in self.stream:
            assert batch.sequence == len(self.batches)
            for event in batch.events:
                match event:
                    case KvCleared():
                        self.blocks.clear()
                    case KvRemoved():
                        for key in event.block_hashes:
                            del self.blocks[key]
                    case KvStored():
                        parent = event.parent_hash
                        assert parent is None or parent in self.blocks
                        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
                        self.blocks.update(dict.fromkeys(event.block_hashes, event))
            self.batches.append(batch)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def done(self) -> bool:
        return self._task.done()

    async def ended(self) -> None:
        await asyncio.wait_for(self._task, 10)


async def test_blocks_are_announced_when_they_become_reusable(llama: Path, engine: Engine) -> None:
    """Prompt and answer, in chain order, with salt; a repeated prompt announces nothing new."""
    async with engine(llama, block_size=8) as running:
        listener = Listener(running)
        await running.until(lambda: len(listener.batches) == 1)
        assert listener.batches[0].events == [KvCleared()]
        prompt = prompt_of(20)
        answer = await running.tokens(prompt, 10, cache_salt="salt")
        stored = [event for batch in listener.batches[1:] for event in batch.events]
        assert all(isinstance(event, KvStored) and event.cache_salt == "salt" for event in stored)
        tokens = [token for event in stored if isinstance(event, KvStored) for token in event.token_ids]
        assert tokens == (prompt + answer)[:24]
        count = len(listener.batches)
        await running.tokens(prompt, 10, cache_salt="salt")
        assert len(listener.batches) == count
        await listener.stop()


async def test_events_equal_reuse_under_eviction(llama: Path, engine: Engine) -> None:
    """In a cache too small for all prompts, what events call cached is what the next request finds."""
    async with engine(llama, block_size=8, num_kv_blocks=16) as running:
        listener = Listener(running)
        prompts = [prompt_of(41, seed) for seed in range(5)]
        for turn in range(12):
            prompt = prompts[(turn * 3) % 5]
            chains = {tuple(event.token_ids[:8]) for event in listener.blocks.values() if event.parent_hash is None}
            deltas = await running.deltas(running.request(prompt, 4))
            assert (deltas[0].cached_tokens or 0) % 8 == 0
            assert bool(deltas[0].cached_tokens) == (tuple(prompt[:8]) in chains)
        assert any(isinstance(event, KvRemoved) for batch in listener.batches for event in batch.events)
        await listener.stop()


async def test_a_late_listener_is_told_what_is_there(llama: Path, engine: Engine) -> None:
    """The first batch describes the cache, to the first consumer and to the next one."""
    async with engine(llama, block_size=8) as running:
        await running.tokens(prompt_of(40), 4)
        known = []
        for _ in range(2):
            listener = Listener(running)
            await running.until(lambda listener=listener: bool(listener.blocks))
            known.append(set(listener.blocks))
            await listener.stop()
        assert known[0] == known[1]
        assert len(known[0]) == 5


async def test_a_consumer_that_falls_behind_is_told_anew(
    llama: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backlog is bounded; afterwards the numbers have no gap and the state is right."""
    monkeypatch.setattr("engines.torch.events.BACKLOG", 4)
    async with engine(llama, block_size=4) as running:
        stream = running.host.kv_events()
        assert stream is not None
        first = await anext(aiter(stream))
        for seed in range(6):
            await running.tokens(prompt_of(30, seed), 12)
        second = await anext(aiter(stream))
        assert [first.sequence, second.sequence] == [0, 1]
        assert KvCleared() in second.events
        fresh = {key for event in second.events if isinstance(event, KvStored) for key in event.block_hashes}
        await stream.aclose()  # type: ignore[attr-defined]
        listener = Listener(running)
        await running.until(lambda: bool(listener.blocks))
        assert fresh == set(listener.blocks)
        await listener.stop()


async def test_the_stream_ends_with_the_engine(llama: Path, engine: Engine) -> None:
    """And there is one consumer at a time."""
    async with engine(llama) as running:
        listener = Listener(running)
        await running.until(lambda: bool(listener.batches))
        with pytest.raises(RuntimeError, match="one consumer"):
            await anext(aiter(running.engine.kv_events()))
        assert not listener.done
    await listener.ended()


async def test_without_prefix_caching_nothing_is_cached(llama: Path, engine: Engine) -> None:
    """No reuse, no events."""
    async with engine(llama, enable_prefix_caching=False) as running:
        listener = Listener(running)
        expected = await running.tokens(prompt_of(60), 4)
        deltas = await running.deltas(running.request(prompt_of(60), 4))
        assert deltas[0].cached_tokens == 0
        assert [t for d in deltas for t in d.token_ids] == expected
        assert [event for batch in listener.batches for event in batch.events] == [KvCleared()]
        await running.idle()
        await listener.stop()
