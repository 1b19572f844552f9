"""Several streams as one, each item as soon as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

_DEPTH = 4
"""Items that a stream may be ahead of the consumer, on average: a slow consumer slows the streams down."""


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all streams, interleaved. The first failure closes the others and is raised.

    Closing this closes all of them.
    """
    queue: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue(_DEPTH * len(streams))

    async def forward(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((item,))
        except Exception as error:  # noqa: BLE001  not swallowed: the consumer below raises it
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            match await queue.get():
                case None:
                    running -= 1
                case BaseException() as error:
                    raise error
                case (item,):
                    yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
