"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from core.openai.merge import merge

closed: list[str] = []


async def stream(name: str, count: int, *, error: Exception | None = None) -> AsyncGenerator[str, None]:
    try:
        for i in range(count):
            yield f"{name}{i}"
            await asyncio.sleep(0)
        if error is not None:
            raise error
    finally:
        closed.append(name)


async def test_all_items_in_each_stream_s_order():
    closed.clear()
    items = [item async for item in merge([stream("a", 30), stream("b", 3), stream("c", 0)])]
    assert [i for i in items if i[0] == "a"] == [f"a{i}" for i in range(30)]
    assert [i for i in items if i[0] == "b"] == ["b0", "b1", "b2"]
    assert sorted(closed) == ["a", "b", "c"]


async def test_a_failure_closes_the_others():
    closed.clear()
    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([stream("a", 10**9), stream("b", 2, error=ValueError("broken"))]):
            pass
    assert sorted(closed) == ["a", "b"]


async def test_closing_closes_all():
    closed.clear()
    async with aclosing(merge([stream("a", 10**9), stream("b", 10**9)])) as merged:
        assert await anext(merged) in {"a0", "b0"}
    assert sorted(closed) == ["a", "b"]


async def test_a_slow_consumer_slows_the_streams_down():
    produced = 0

    async def counting() -> AsyncGenerator[int, None]:
        nonlocal produced
        while True:
            produced += 1
            yield produced

    async with aclosing(merge([counting()])) as merged:
        await anext(merged)
        for _ in range(100):
            await asyncio.sleep(0)
        assert produced < 10
