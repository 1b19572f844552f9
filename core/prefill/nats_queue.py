"""The prefill queue of a distributed deployment, on NATS JetStream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable
from typing import TYPE_CHECKING

import msgspec

from core.prefill.messages import PrefillTask
from core.prefill.nats_store import LEVELS, Marks, NatsStore, describe, level_of
from core.prefill.queue import (
    DeadLetter,
    Prefers,
    PrefillQueue,
    QueueSettings,
    QueueUnavailable,
    Room,
    Taken,
    Taker,
    TaskTooLarge,
    Waiting,
    choose,
)

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

logger = logging.getLogger("dynamo.prefill")

POLL = 0.5
"""Seconds after which a waiting taker looks even if nobody woke it: redeliveries wake nobody."""
DEPTH_AGE = 0.05
"""Seconds for which a depth is believed, so that a burst of decisions asks the server once."""
_FULL = 10077
_HEADERS = 512
"""Bytes to leave for headers below the server's largest message."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(PrefillTask)
_letters = msgspec.msgpack.Decoder(DeadLetter)


class NatsQueue(PrefillQueue):
    """Tasks on a JetStream server. The connection is the caller's; `open` makes what is missing on the server."""

    def __init__(
        self,
        client: Client,
        name: str,
        settings: QueueSettings | None = None,
        *,
        max_age: float = 600.0,
        answer: float = 2.0,
    ) -> None:
        """`name`: one queue a model. `max_age`: seconds after which a task that nobody took is forgotten by the server;
        its client has had an answer from elsewhere long before. `answer`: seconds that the server has to answer.
        """
        super().__init__(settings)
        self._store = NatsStore(client, name, self.settings, max_age=max_age, answer=answer)
        self._sequences: OrderedDict[str, int] = OrderedDict()
        self._depth = (0.0, 0)
        self._asking = asyncio.Lock()
        self._closed = asyncio.Event()

    async def open(self) -> None:
        """Raises `QueueUnavailable`, with a sentence, when the server cannot be reached or has no JetStream."""
        await self._store.ensure()

    async def submit(self, task: PrefillTask) -> None:
        self._require_open()
        payload = _encoder.encode(task)
        largest = self._store.client.max_payload - _HEADERS
        if len(payload) > largest:
            raise TaskTooLarge(
                f"The task of {task.tokens} tokens is {len(payload)} bytes and the NATS server takes {largest}: "
                "raise max_payload in its configuration."
            )
        acknowledged = await self._store.recovering(lambda: self._publish(task, payload))
        if acknowledged:
            self._sequences[task.task_id] = acknowledged
            if len(self._sequences) > 2 * self.settings.capacity:
                self._sequences.popitem(last=False)
            self.count(submitted=1)
            with contextlib.suppress(Exception):
                await self._store.wake()

    async def _publish(self, task: PrefillTask, payload: bytes) -> int:
        from nats.js.errors import APIError

        async with self._store.reaching():
            try:
                ack = await self._store.publish_task(task.level, payload, task.task_id)
            except APIError as error:
                if error.err_code != _FULL:
                    raise
                raise self.full() from error
        return 0 if ack.duplicate else ack.seq

    async def cancel(self, task_id: str) -> None:
        sequence = self._sequences.pop(task_id, None)
        if sequence is None:
            return
        self.count(cancelled=1)
        try:
            await self._store.delete_task(sequence)
        except QueueUnavailable as error:
            if getattr(error.__cause__, "err_code", None) is None:
                logger.warning("Task '%s' could not be cancelled: %s", task_id, error)

    async def depth(self) -> int:
        self._require_open()
        async with self._asking:
            at, depth = self._depth
            if time.monotonic() - at > DEPTH_AGE:
                depth = await self._store.recovering(self._store.depth)
                self._depth = (time.monotonic(), depth)
            return depth

    def taker(self, worker_id: str) -> NatsTaker:
        return NatsTaker(self, self._store, self._closed, worker_id)

    async def dead_letters(self) -> list[DeadLetter]:
        return [_letters.decode(letter) for letter in await self._store.dead_letters()]

    async def close(self) -> None:
        self._closed.set()

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise QueueUnavailable("The prefill queue has been closed.")


class NatsTaker(Taker):
    """See `Taker`. Owns a subscription, and a task that keeps what it has taken."""

    def __init__(self, queue: NatsQueue, store: NatsStore, closed: asyncio.Event, worker_id: str) -> None:
        self.worker_id = worker_id
        self._queue = queue
        self._store = store
        self._closed = closed
        self._inbox = store.client.new_inbox()
        self._subscriptions: list[Subscription] = []
        self._wake = asyncio.Event()
        self._held: set[NatsTaken] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._taking = asyncio.Lock()

    async def take(self, room: Room, wait: float, prefers: Prefers | None = None) -> list[Taken]:
        deadline = time.monotonic() + wait
        async with self._taking:
            await self._begin()
            while not self._closed.is_set():
                self._wake.clear()
                if found := await self._store.recovering(lambda: self._look(room, prefers)):
                    return found
                left = deadline - time.monotonic()
                if left <= 0 or room.tasks < 1:
                    return []
                try:
                    async with asyncio.timeout(min(POLL, left)):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        raise QueueUnavailable("The prefill queue has been closed.")

    async def _look(self, room: Room, prefers: Prefers | None) -> list[Taken]:
        found: list[Taken] = []
        try:
            await self._look_at_levels(room, prefers, found)
        except QueueUnavailable:
            if not found:
                raise
        except BaseException:
            for item in found:
                await item.give_back()
            raise
        return found

    async def _look_at_levels(self, room: Room, prefers: Prefers | None, found: list[Taken]) -> None:
        for level in LEVELS:
            if room.tasks < 1:
                break
            window = self._queue.settings.window
            messages = await self._fetch(level, window if prefers is not None else min(room.tasks, window))
            if not messages:
                continue
            taken, all_taken = await self._pick(level, messages, room, prefers)
            found += taken
            room = Room(room.tasks - len(taken), room.tokens - sum(item.task.tokens for item in taken))
            if not all_taken:
                break  # a lower level does not overtake a higher one

    async def _pick(
        self, level: int, messages: list[Msg], room: Room, prefers: Prefers | None
    ) -> tuple[list[NatsTaken], bool]:
        kept = list(messages)
        marking: list[PrefillTask] = []
        try:
            kept, tasks = await self._decode(messages)
            more = self._queue.settings.window - len(messages)
            if more > 0 and len(messages) >= room.tasks and sum(task.tokens for task in tasks) > room.tokens:
                kept_too, tasks_too = await self._decode(await self._fetch(level, more))
                kept, tasks = kept + kept_too, tasks + tasks_too
            marks = [Marks()] * len(tasks)
            if any(message.metadata.num_delivered > 1 for message in kept):
                marks = await self._store.marks(task.task_id for task in tasks)
            waiting = [Waiting(task, mark.passes) for task, mark in zip(tasks, marks, strict=True)]
            choice = choose(waiting, room, prefers, self._queue.settings.max_overtakes)
            marking = [tasks[i] for i in choice.taken if not marks[i].runs]
            await asyncio.gather(
                *(self._store.mark(tasks[i].task_id, "run") for i in choice.taken),
                *(self._store.mark(tasks[i].task_id, "pass", times) for i, times in enumerate(choice.passes) if times),
            )
        except BaseException:
            for task in marking:
                await self._attempt(self._store.unmark(task.task_id, "run"))
            await self._hand_back(kept)
            raise
        self._queue.count(taken=len(choice.taken), overtaken=sum(choice.passes))
        taken = [NatsTaken(self._queue, self._store, self._held, kept[i], tasks[i], marks[i]) for i in choice.taken]
        self._held.update(taken)
        chosen = set(choice.taken)
        left = [message for i, message in enumerate(kept) if i not in chosen]
        await self._hand_back(left)
        if left and taken:
            await self._attempt(self._store.wake())
        return taken, not left

    async def _fetch(self, level: int, count: int) -> list[Msg]:
        """Up to `count` messages that wait now, oldest first."""
        inbox = self._subscriptions[0]
        messages: list[Msg] = []
        try:
            async with self._store.reaching():
                await self._store.request_tasks(level, count, self._inbox)
                while len(messages) < count:
                    message = await inbox.next_msg(timeout=None)
                    status = (message.headers or {}).get("Status")
                    if status in ("404", "408"):
                        break
                    if status is not None:
                        await self._store.ensure()  # the server was restarted without its data
                        break
                    if level_of(message.subject) == level:
                        messages.append(message)
                    else:
                        await message.nak()  # of a request that was given up
        except BaseException:
            await self._hand_back(messages)
            raise
        return messages

    async def _decode(self, messages: list[Msg]) -> tuple[list[Msg], list[PrefillTask]]:
        kept, tasks = [], []
        for message in messages:
            try:
                tasks.append(_decoder.decode(message.data))
                kept.append(message)
            except msgspec.MsgspecError as error:
                logger.error("A message in prefill queue '%s' is no task and is dropped: %s", self._store.name, error)
                await message.term()
        return kept, tasks

    async def _hand_back(self, messages: list[Msg]) -> None:
        for message in messages:
            await self._attempt(message.nak())

    async def _begin(self) -> None:
        if self._subscriptions:
            return

        async def woken(_: Msg) -> None:
            self._wake.set()

        async with self._store.reaching():
            client = self._store.client
            self._subscriptions = [
                await client.subscribe(self._inbox),
                await client.subscribe(self._store.wake_subject, cb=woken),
            ]
        self._keeping = asyncio.create_task(self._keep(), name=f"prefill-queue-keep-{self.worker_id}")

    async def _keep(self) -> None:
        """Shows signs of life for everything that is held."""
        while True:
            await asyncio.sleep(self._queue.settings.ack_wait / 3)
            for item in list(self._held):
                await self._attempt(item.keep())

    async def close(self) -> None:
        for item in list(self._held):
            await item.give_back()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
            self._keeping = None
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await self._attempt(subscription.unsubscribe())

    async def _attempt(self, call: Awaitable[object]) -> None:
        """For what the server makes good by itself when it does not hear it: after `ack_wait` a task is redelivered."""
        import nats.errors

        try:
            await call
        except (QueueUnavailable, nats.errors.Error, OSError) as error:
            logger.warning("Prefill queue '%s': %s", self._store.name, describe(error))


class NatsTaken(Taken):
    """See `Taken`."""

    def __init__(
        self, queue: NatsQueue, store: NatsStore, held: set[NatsTaken], message: Msg, task: PrefillTask, before: Marks
    ) -> None:
        self._queue = queue
        self._store = store
        self._held = held
        self._message: Msg | None = message
        self._silences = before.runs
        self.delivery = message.metadata.num_delivered
        self.task = task
        self.attempt = 1 + before.tries + before.losses + before.runs
        self.silent = before.tries == 0
        self.max_attempts = queue.settings.max_attempts

    async def keep(self) -> None:
        """Show a sign of life."""
        if self._message is not None:
            await self._message.in_progress()

    async def ack(self) -> None:
        if (message := self._finish()) is not None:
            self._queue.count(acknowledged=1)
            await self._tell(self._store.settle(message), self._store.unmark(self.task.task_id))

    async def retry(self) -> None:
        if (message := self._finish()) is not None:
            self._queue.count(retried=1)
            await self._tell(self._store.mark(self.task.task_id, "try"))
            await self._end_run()
            await self._tell(message.nak(delay=self._queue.settings.retry_delay or None))

    async def give_back(self) -> None:
        if (message := self._finish()) is not None:
            self._queue.count(returned=1)
            await self._end_run()
            await self._tell(message.nak(), self._store.wake())

    async def bury(self, reason: str) -> None:
        if (message := self._finish()) is not None:
            self._queue.count(dead=1)
            letter = DeadLetter(self.task, reason, min(self.attempt, self.max_attempts))
            await self._tell(self._store.bury(_encoder.encode(letter)))
            await self._tell(message.term(), self._store.unmark(self.task.task_id))

    async def _end_run(self) -> None:
        """Nobody runs it now; silent tries before this one stay counted."""
        if self._silences:
            await self._tell(self._store.mark(self.task.task_id, "lost", self._silences))
        await self._tell(self._store.unmark(self.task.task_id, "run"))

    def _finish(self) -> Msg | None:
        message, self._message = self._message, None
        self._held.discard(self)
        return message

    async def _tell(self, *calls: Awaitable[object]) -> None:
        """What is not heard is made good: the task is delivered again, and its decode worker says that it is gone."""
        import nats.errors

        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, QueueUnavailable | nats.errors.Error | OSError):
                logger.warning("Task '%s': %s", self.task.task_id, describe(result))
            elif isinstance(result, BaseException):
                raise result
