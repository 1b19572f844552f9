"""Holds requests at the router while every worker is saturated.

A request that waits here can still go to whichever worker has room first, with the caches as they are then; one that
waits at a worker cannot. The queue knows nothing of workers: it is given an attempt that succeeds or does not, tries it
again whenever something may have changed, and hands its result to the one who waits.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from core.messages import Overloaded
from core.routing.config import QueueOrder

T = TypeVar("T")

MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0


class RouterQueue(Generic[T]):
    """Requests that wait for room, in order, at most `limit` of them."""

    def __init__(
        self, limit: int, order: QueueOrder = QueueOrder.FCFS, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit = limit
        self._by_priority = order is QueueOrder.PRIORITY
        self._clock = clock
        self._arrivals = itertools.count()
        self._heap: list[tuple[int, int, Callable[[], T | None], asyncio.Future[T]]] = []
        self._waiting = 0
        """Entries of the heap whose owner still waits; the others gave up and are passed over."""
        self._admitting = False
        self._seconds_each = 0.0
        """Between two admissions from the queue, as a moving average; 0 until there were two."""
        self._last_admission: float | None = None

    def __len__(self) -> int:
        """Requests that wait."""
        return self._waiting

    async def submit(
        self,
        attempt: Callable[[], T | None],
        *,
        priority: int = 0,
        timeout: float | None = None,  # noqa: ASYNC109 - the remaining part of the request's own deadline
        undo: Callable[[T], None] | None = None,
    ) -> T:
        """The result of `attempt` once it is not None: now if nobody waits and it succeeds, else when it is its turn.

        `timeout` is in seconds. `undo` is called with a result that came while the caller was being cancelled. Raises
        `Overloaded` when `limit` requests wait already or the time is up, and whatever `attempt` raises.
        """
        if not self._waiting and (result := attempt()) is not None:
            return result
        if self._waiting >= self.limit:
            raise Overloaded(
                f"Every worker is saturated and {self._waiting} requests wait already, the most that "
                "router-queue-limit allows; try again later.",
                retry_after=self.retry_after(),
            )
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        rank = -priority if self._by_priority else 0
        heapq.heappush(self._heap, (rank, next(self._arrivals), attempt, future))
        self._waiting += 1
        delivered = False
        try:
            async with asyncio.timeout(timeout):
                result = await future
            delivered = True
            return result
        except TimeoutError:
            raise Overloaded(
                f"Every worker stayed saturated for {timeout:.1f} seconds, the time this request had; try again later.",
                retry_after=self.retry_after(),
            ) from None
        finally:
            self._settle(future, delivered, undo)

    def poke(self) -> None:
        """Something may have changed: admits as many, in order, as attempts succeed. Cheap when nobody waits."""
        if self._admitting:
            return
        self._admitting = True
        try:
            while self._heap:
                _, _, attempt, future = self._heap[0]
                if future.done():
                    heapq.heappop(self._heap)
                    continue
                try:
                    result = attempt()
                except Exception as error:  # noqa: BLE001 - whoever waits for the attempt gets its error
                    future.set_exception(error)
                else:
                    if result is None:
                        return
                    future.set_result(result)
                heapq.heappop(self._heap)
                self._waiting -= 1
                self._count_admission()
        finally:
            self._admitting = False

    def retry_after(self) -> float:
        """Seconds in which the queue, at its recent pace, will have served those who wait now."""
        return min(max(self._waiting * self._seconds_each, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    def _settle(self, future: asyncio.Future[T], delivered: bool, undo: Callable[[T], None] | None) -> None:
        """The waiter goes. If it goes without its result, the result is taken back or its place given up."""
        if future.cancelled():
            self._waiting -= 1
            if self._waiting * 2 < len(self._heap):
                self._heap = [entry for entry in self._heap if not entry[3].done()]
                heapq.heapify(self._heap)
        elif not delivered and future.exception() is None and undo is not None:
            undo(future.result())

    def _count_admission(self) -> None:
        now = self._clock()
        if self._last_admission is not None:
            passed = now - self._last_admission
            self._seconds_each = 0.8 * self._seconds_each + 0.2 * passed if self._seconds_each else passed
        self._last_admission = now

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the number that waits is not that of the open entries."""
        waiting = sum(not entry[3].done() for entry in self._heap)
        assert waiting == self._waiting, f"{self._waiting} are counted, {waiting} wait"
