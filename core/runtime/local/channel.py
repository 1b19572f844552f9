"""Hands changes to watchers: an unbounded, closable queue for one consumer."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The channel was closed and everything in it has been taken."""


class Channel(Generic[T]):
    """First in, first out. With a `bound`, the oldest item makes room for the newest and is counted in `dropped`."""

    def __init__(self, bound: int | None = None) -> None:
        self._items: deque[T] = deque(maxlen=bound)
        self._ready = asyncio.Event()
        self._closed = False
        self.dropped = 0

    def put(self, item: T) -> None:
        """Never waits. Nothing happens after `close`."""
        if self._closed:
            return
        if len(self._items) == self._items.maxlen:
            self.dropped += 1
        self._items.append(item)
        self._ready.set()

    async def get(self) -> T:
        """Raises `Closed` when nothing will come any more."""
        while not self._items:
            if self._closed:
                raise Closed
            self._ready.clear()
            await self._ready.wait()
        return self._items.popleft()

    def close(self) -> None:
        """What is in the channel can still be taken. Idempotent."""
        self._closed = True
        self._ready.set()
