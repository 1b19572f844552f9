"""KV events on their way to their one consumer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from core.messages import KvCleared, KvEvent, KvEventBatch

if TYPE_CHECKING:
    from engines.torch.thread import EngineThread

BACKLOG = 10_000
"""Events behind its start that may wait for a slow consumer; beyond, it is given the cache's state anew instead."""


class EventFeed:
    """Numbers events and hands them over. Lives on the event loop."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self._waiting: list[KvEvent] = []
        self._ready = asyncio.Event()
        self._following = False
        self._resyncing = True
        self._limit = BACKLOG
        self._ended = False

    def push(self, events: list[KvEvent]) -> None:
        """Adds a step's events."""
        if self._resyncing:
            if not isinstance(events[0], KvCleared):
                return
            self._resyncing = False
            self._limit = len(events) + BACKLOG
        self._waiting += events
        if len(self._waiting) > self._limit:
            self._resync()
        else:
            self._ready.set()

    def end(self) -> None:
        """Ends the stream after what is waiting. Idempotent."""
        self._ended = True
        self._ready.set()

    async def follow(self) -> AsyncIterator[KvEventBatch]:
        """Batches numbered from 0; the first describes the cache as it is. Raises when it is followed already."""
        if self._following:
            raise RuntimeError("KV events have one consumer, and it is still there")
        self._following = True
        self._resync()
        sequence = 0
        try:
            while True:
                await self._ready.wait()
                self._ready.clear()
                if self._waiting:
                    events, self._waiting = self._waiting, []
                    yield KvEventBatch(sequence=sequence, events=events)
                    sequence += 1
                if self._ended:
                    return
        finally:
            self._following = False
            self._resyncing = True  # what is still on its way is for nobody
            self._thread.deafen()

    def _resync(self) -> None:
        """Drops what is waiting and asks for the state of the cache, which a `KvCleared` begins."""
        self._waiting.clear()
        self._resyncing = True
        self._thread.listen()
