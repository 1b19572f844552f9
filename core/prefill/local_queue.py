"""The prefill queue of one process."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from core.prefill.messages import TOP_PRIORITY, PrefillTask
from core.prefill.queue import (
    DeadLetter,
    Prefers,
    PrefillQueue,
    QueueSettings,
    QueueUnavailable,
    Room,
    Taken,
    Taker,
    Waiting,
    choose,
)

KEPT_DEAD_LETTERS = 256


class _Entry:
    """One task in the queue, waiting or taken."""

    __slots__ = (
        "cancelled",
        "deliveries",
        "failures",
        "not_before",
        "number",
        "overtaken",
        "owner",
        "silences",
        "task",
    )

    def __init__(self, task: PrefillTask, number: int) -> None:
        self.task = task
        self.number = number
        self.overtaken = 0
        self.deliveries = 0
        self.failures = 0
        self.silences = 0
        self.not_before = 0.0
        self.cancelled = False
        self.owner: LocalTaker | None = None


class LocalQueue(PrefillQueue):
    """Tasks of one process. A taker that was lost without `close` is noticed when `LocalTaker.lose` is called."""

    def __init__(self, settings: QueueSettings | None = None) -> None:
        super().__init__(settings)
        self._entries: dict[str, _Entry] = {}
        self._waiting: dict[int, list[_Entry]] = {level: [] for level in range(TOP_PRIORITY, -TOP_PRIORITY - 1, -1)}
        self._dead: deque[DeadLetter] = deque(maxlen=KEPT_DEAD_LETTERS)
        self._changed = asyncio.Condition()
        self._number = 0
        self._idle_waiting = 0
        """Takers that have nothing to do and wait: they go before busy ones."""
        self._closed = False

    async def submit(self, task: PrefillTask) -> None:
        self._require_open()
        if task.task_id in self._entries:
            return
        if len(self._entries) >= self.settings.capacity:
            raise self.full()
        self._number += 1
        entry = _Entry(task, self._number)
        self._entries[task.task_id] = entry
        self._waiting[task.level].append(entry)
        self.count(submitted=1)
        await self._notify()

    async def cancel(self, task_id: str) -> None:
        entry = self._entries.get(task_id)
        if entry is None or entry.cancelled:
            return
        self.count(cancelled=1)
        entry.cancelled = True
        if entry.owner is None:
            self._waiting[entry.task.level].remove(entry)
            del self._entries[task_id]

    async def depth(self) -> int:
        self._require_open()
        return sum(len(entries) for entries in self._waiting.values())

    def taker(self, worker_id: str) -> LocalTaker:
        return LocalTaker(self, worker_id)

    async def dead_letters(self) -> list[DeadLetter]:
        return list(self._dead)

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a task is lost or in two places."""
        waiting = [entry for entries in self._waiting.values() for entry in entries]
        assert len(waiting) == len({entry.task.task_id for entry in waiting}), "a task waits twice"
        for entry in waiting:
            assert entry.owner is None, f"task '{entry.task.task_id}' waits and is taken"
            assert self._entries.get(entry.task.task_id) is entry, f"task '{entry.task.task_id}' waits and is gone"
        owned = sum(entry.owner is not None for entry in self._entries.values())
        assert owned + len(waiting) == len(self._entries), "a task neither waits nor is taken"

    async def close(self) -> None:
        self._closed = True
        await self._notify()

    async def take_for(self, taker: LocalTaker, room: Room, wait: float, prefers: Prefers | None) -> list[_Entry]:
        """See `Taker.take`."""
        deadline = time.monotonic() + wait
        async with self._changed:
            self._idle_waiting += room.idle
            try:
                return await self._take_until(deadline, taker, room, prefers)
            finally:
                self._idle_waiting -= room.idle
                self._changed.notify_all()

    async def _take_until(
        self, deadline: float, taker: LocalTaker, room: Room, prefers: Prefers | None
    ) -> list[_Entry]:
        while True:
            self._require_open()
            if (room.idle or not self._idle_waiting) and (found := self._pick(taker, room, prefers)):
                return found
            now = time.monotonic()
            if now >= deadline or room.tasks < 1:
                return []
            wakes = [e.not_before for entries in self._waiting.values() for e in entries if e.not_before > now]
            try:
                async with asyncio.timeout(min([deadline, *wakes]) - now):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _pick(self, taker: LocalTaker, room: Room, prefers: Prefers | None) -> list[_Entry]:
        now = time.monotonic()
        found: list[_Entry] = []
        for entries in self._waiting.values():
            if not entries:
                continue
            due = [entry for entry in entries if entry.not_before <= now]
            window = due[: self.settings.window]
            choice = choose([Waiting(e.task, e.overtaken) for e in window], room, prefers, self.settings.max_overtakes)
            for entry, passes in zip(window, choice.passes, strict=True):
                entry.overtaken += passes
            if overtaken := sum(choice.passes):
                self.count(overtaken=overtaken)
            for index in choice.taken:
                entry = window[index]
                entries.remove(entry)
                entry.owner = taker
                found.append(entry)
                room = Room(room.tasks - 1, room.tokens - entry.task.tokens)
            if len(choice.taken) < len(due):
                break  # a lower level does not overtake a higher one
        if found:
            self.count(taken=len(found))
        return found

    def end(self, entry: _Entry) -> None:
        """The task leaves the queue."""
        del self._entries[entry.task.task_id]
        entry.owner = None

    async def requeue(self, entry: _Entry, delay: float) -> None:
        """The task waits again, at its old place."""
        entry.owner = None
        if entry.cancelled:
            del self._entries[entry.task.task_id]
            return
        entry.not_before = time.monotonic() + delay
        entries = self._waiting[entry.task.level]
        entries.append(entry)
        entries.sort(key=lambda e: e.number)
        await self._notify()

    def keep(self, letter: DeadLetter) -> None:
        """Remember a dead letter."""
        self._dead.append(letter)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _require_open(self) -> None:
        if self._closed:
            raise QueueUnavailable("The prefill queue has been closed.")


class LocalTaker(Taker):
    """See `Taker`."""

    def __init__(self, queue: LocalQueue, worker_id: str) -> None:
        self._queue = queue
        self.worker_id = worker_id
        self._held: dict[str, LocalTaken] = {}

    async def take(self, room: Room, wait: float, prefers: Prefers | None = None) -> list[Taken]:
        entries = await self._queue.take_for(self, room, wait, prefers)
        taken = [LocalTaken(self._queue, self, entry) for entry in entries]
        self._held.update((item.task.task_id, item) for item in taken)
        return list(taken)

    def drop(self, task_id: str) -> None:
        """The task is not this taker's any more."""
        self._held.pop(task_id, None)

    async def close(self) -> None:
        for item in list(self._held.values()):
            await item.give_back()

    async def lose(self) -> None:
        """The worker is gone without a word: what it had is delivered to others. For the owner that sees it die."""
        for item in list(self._held.values()):
            await item.vanish()


class LocalTaken(Taken):
    """See `Taken`."""

    def __init__(self, queue: LocalQueue, taker: LocalTaker, entry: _Entry) -> None:
        self._queue = queue
        self._taker = taker
        self._entry: _Entry | None = entry
        entry.deliveries += 1
        self.delivery = entry.deliveries
        self.task = entry.task
        self.attempt = 1 + entry.failures + entry.silences
        self.silent = entry.failures == 0
        self.max_attempts = queue.settings.max_attempts

    async def ack(self) -> None:
        if (entry := self._finish()) is not None:
            self._queue.end(entry)
            self._queue.count(acknowledged=1)

    async def retry(self) -> None:
        if (entry := self._finish()) is not None:
            entry.failures += 1
            self._queue.count(retried=1)
            await self._queue.requeue(entry, self._queue.settings.retry_delay)

    async def give_back(self) -> None:
        if (entry := self._finish()) is not None:
            self._queue.count(returned=1)
            await self._queue.requeue(entry, 0.0)

    async def bury(self, reason: str) -> None:
        if (entry := self._finish()) is not None:
            self._queue.keep(DeadLetter(self.task, reason, min(self.attempt, self.max_attempts)))
            self._queue.end(entry)
            self._queue.count(dead=1)

    async def vanish(self) -> None:
        """The worker died with it."""
        if (entry := self._finish()) is not None:
            entry.silences += 1
            await self._queue.requeue(entry, 0.0)

    def _finish(self) -> _Entry | None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._taker.drop(self.task.task_id)
        return entry
