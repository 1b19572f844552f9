"""Work queues within the process."""

from __future__ import annotations

import asyncio
from collections import deque

from core.runtime.interface import QueueTask, WorkQueue


class LocalTask(QueueTask):
    """See `QueueTask`."""

    def __init__(self, queue: LocalQueue, payload: bytes, deliveries: int) -> None:
        self.payload = payload
        self.deliveries = deliveries
        self._queue = queue

    async def ack(self) -> bool:
        return self._queue.settle(self)

    async def nack(self, delay: float = 0.0) -> bool:
        if not self._queue.settle(self):
            return False
        self._queue.give_back(self, delay)
        return True

    async def in_progress(self) -> bool:
        return self._queue.prolong(self)


class LocalQueue(WorkQueue):
    """See `WorkQueue`. A task is in exactly one place: waiting, taken, or delayed until it is delivered again."""

    def __init__(self, name: str, ack_wait: float) -> None:
        self.name = name
        self._ack_wait = ack_wait
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._taken: dict[LocalTask, asyncio.TimerHandle] = {}
        self._delayed: dict[LocalTask, asyncio.TimerHandle] = {}
        self._arrived = asyncio.Event()

    async def put(self, payload: bytes) -> None:
        self._waiting.append((payload, 0))
        self._arrived.set()

    async def get(self) -> QueueTask:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        payload, deliveries = self._waiting.popleft()
        task = LocalTask(self, payload, deliveries + 1)
        self._start_clock(task)
        return task

    async def depth(self) -> int:
        return len(self._waiting)

    def settle(self, task: LocalTask) -> bool:
        """Take the task out of the consumer's hands. False when it was not in them any more."""
        clock = self._taken.pop(task, None)
        if clock is None:
            return False
        clock.cancel()
        return True

    def give_back(self, task: LocalTask, delay: float) -> None:
        """Deliver a settled task again: before all others, because it is older."""
        if delay > 0:
            self._delayed[task] = asyncio.get_running_loop().call_later(delay, self._return, task)
        else:
            self._return(task)

    def prolong(self, task: LocalTask) -> bool:
        """Restart the clock of a task that is in a consumer's hands."""
        if not self.settle(task):
            return False
        self._start_clock(task)
        return True

    def close(self) -> None:
        """Stop every clock. The queue is gone with its process; nothing is delivered again."""
        for clock in (*self._taken.values(), *self._delayed.values()):
            clock.cancel()
        self._taken.clear()
        self._delayed.clear()

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a task is in two places."""
        assert not self._taken.keys() & self._delayed.keys()

    def _start_clock(self, task: LocalTask) -> None:
        loop = asyncio.get_running_loop()
        self._taken[task] = loop.call_later(self._ack_wait, self._expire, task)

    def _expire(self, task: LocalTask) -> None:
        if self.settle(task):
            self._return(task)

    def _return(self, task: LocalTask) -> None:
        self._delayed.pop(task, None)
        self._waiting.appendleft((task.payload, task.deliveries))
        self._arrived.set()
