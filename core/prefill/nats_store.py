"""What the JetStream prefill queue keeps on the server, and every request that it makes there.

Three streams, named after the queue:

    NAME        the tasks, one subject a level; work-queue retention: a message is gone once it is acknowledged
    NAME_marks  what JetStream does not count exactly: `run` (a try has begun), `try` (it failed), `lost` (it ended in
                silence), `pass` (overtaken), one short message each under the task's token
    NAME_dead   dead letters, for an operator to look at

JetStream's own delivery counter cannot tell a try from a look: a taker that looks at a window of tasks has them
delivered and hands back what it does not take.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from core.messages.errors import ConfigError
from core.prefill.messages import TOP_PRIORITY
from core.prefill.queue import QueueSettings, QueueUnavailable

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js.api import PubAck, StreamConfig

T = TypeVar("T")
LEVELS = tuple(range(TOP_PRIORITY, -TOP_PRIORITY - 1, -1))
DUPLICATE_WINDOW = 120.0
"""Seconds for which the server remembers task ids, so that a submit that is repeated queues nothing twice."""
KEPT_DEAD_LETTERS = 256
_NO_SUCH_STREAM = (10014, 10059)
_CONFIGURED_OTHERWISE = 10058


class Marks(msgspec.Struct, frozen=True):
    """What the marks say of one task."""

    runs: int = 0
    tries: int = 0
    losses: int = 0
    passes: int = 0


class NatsStore:
    """The server side of one queue. Everything raises `QueueUnavailable` when the server does not answer in time."""

    def __init__(self, client: Client, name: str, settings: QueueSettings, *, max_age: float, answer: float) -> None:
        """`max_age`: seconds after which the server forgets a task; `answer`: seconds that it has to answer."""
        self.client = client
        self.name = _stream_name(name)
        self._settings = settings
        self._max_age = max_age
        self._answer = answer
        self._jetstream = client.jetstream(timeout=answer)

    @property
    def wake_subject(self) -> str:
        """Where takers hear that there may be something to take."""
        return f"{self.name}.wake"

    async def ensure(self) -> None:
        """Make the streams and consumers, or bring them to these settings."""
        from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

        name, age = self.name, self._max_age
        async with self.reaching():
            await self._stream(
                StreamConfig(
                    name=name,
                    subjects=[f"{name}.task.*"],
                    retention=RetentionPolicy.WORK_QUEUE,
                    discard=DiscardPolicy.NEW,
                    max_msgs=self._settings.capacity,
                    max_age=age,
                    storage=StorageType.FILE,
                    duplicate_window=min(DUPLICATE_WINDOW, age),
                )
            )
            await self._stream(
                StreamConfig(
                    name=f"{name}_marks", subjects=[f"{name}.mark.>"], max_age=2 * age, storage=StorageType.FILE
                )
            )
            await self._stream(
                StreamConfig(
                    name=f"{name}_dead",
                    subjects=[f"{name}.dead"],
                    max_msgs=KEPT_DEAD_LETTERS,
                    storage=StorageType.FILE,
                )
            )
            for level in LEVELS:
                await self._jetstream.add_consumer(
                    name,
                    ConsumerConfig(
                        durable_name=_consumer(level),
                        filter_subject=f"{name}.task.{_level(level)}",
                        ack_policy=AckPolicy.EXPLICIT,
                        ack_wait=self._settings.ack_wait,
                        max_deliver=-1,
                        max_ack_pending=-1,
                    ),
                )

    async def publish_task(self, level: int, payload: bytes, task_id: str) -> PubAck:
        """Append a task. Errors of the server come as they are: the caller knows what they mean."""
        subject = f"{self.name}.task.{_level(level)}"
        return await self._jetstream.publish(subject, payload, headers={"Nats-Msg-Id": task_id})

    async def delete_task(self, sequence: int) -> None:
        """Remove one message from the stream."""
        async with self.reaching():
            await self._jetstream.delete_msg(self.name, sequence)

    async def request_tasks(self, level: int, count: int, inbox: str) -> None:
        """Have up to `count` waiting messages of a level sent to `inbox`, then a status if there are fewer."""
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.name}.{_consumer(level)}"
        await self.client.publish(subject, json.dumps({"batch": count, "no_wait": True}).encode(), reply=inbox)

    async def wake(self) -> None:
        """Tell takers that there may be something to take. Not reliable; they look by themselves as well."""
        await self.client.publish(self.wake_subject)

    async def mark(self, task_id: str, kind: str, times: int = 1) -> None:
        """Add marks; returns when the server has them."""
        subject = f"{self.name}.mark.{_token(task_id)}.{kind}"
        async with self.reaching():
            await asyncio.gather(*(self._jetstream.publish(subject, b"") for _ in range(times)))

    async def unmark(self, task_id: str, kind: str | None = None) -> None:
        """Remove the marks of a kind, or all."""
        async with self.reaching():
            await self._jetstream.purge_stream(
                f"{self.name}_marks", subject=f"{self.name}.mark.{_token(task_id)}.{kind or '*'}"
            )

    async def marks(self, task_ids: Iterable[str]) -> list[Marks]:
        """The marks of some tasks: one request, however many."""
        async with self.reaching():
            info = await self._jetstream.stream_info(f"{self.name}_marks", subjects_filter=f"{self.name}.mark.>")
        counts = Counter(info.state.subjects or {})
        found = []
        for task_id in task_ids:
            prefix = f"{self.name}.mark.{_token(task_id)}."
            kinds = (counts[prefix + kind] for kind in ("run", "try", "lost", "pass"))
            found.append(Marks(*kinds))
        return found

    async def depth(self) -> int:
        """Tasks that wait: those on the server less those that run."""
        async with self.reaching():
            tasks, running = await asyncio.gather(
                self._jetstream.stream_info(self.name),
                self._jetstream.stream_info(f"{self.name}_marks", subjects_filter=f"{self.name}.mark.*.run"),
            )
        return max(0, tasks.state.messages - len(running.state.subjects or {}))

    async def bury(self, letter: bytes) -> None:
        """Keep a dead letter."""
        async with self.reaching():
            await self._jetstream.publish(f"{self.name}.dead", letter)

    async def dead_letters(self) -> list[bytes]:
        """All that are kept, oldest first."""
        async with self.reaching():
            state = (await self._jetstream.stream_info(f"{self.name}_dead")).state
            letters = []
            for sequence in range(max(1, state.first_seq), state.last_seq + 1):
                message = await self._jetstream.get_msg(f"{self.name}_dead", sequence)
                letters.append(message.data or b"")
            return letters

    async def settle(self, message: Msg) -> None:
        """Acknowledge, and wait until the server has heard it."""
        async with self.reaching():
            await message.ack_sync(timeout=self._answer)

    async def recovering(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of `call`, which is tried once more when the server turns out to have lost what it kept."""
        try:
            return await call()
        except QueueUnavailable as error:
            if not is_missing(error.__cause__):
                raise
        await self.ensure()
        return await call()

    @contextlib.asynccontextmanager
    async def reaching(self) -> AsyncIterator[None]:
        """Turns whatever the client library raises into `QueueUnavailable` with a sentence."""
        import nats.errors

        if not self.client.is_connected:
            raise QueueUnavailable(
                f"The prefill queue '{self.name}' cannot be reached: there is no connection to NATS. "
                "Prompts are prefilled where they are decoded until it is back."
            )
        try:
            async with asyncio.timeout(2 * self._answer):
                yield
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise QueueUnavailable(f"The prefill queue '{self.name}' does not work: {describe(error)}.") from error

    async def _stream(self, config: StreamConfig) -> None:
        from nats.js.errors import APIError

        try:
            await self._jetstream.add_stream(config)
        except APIError as error:
            if error.err_code != _CONFIGURED_OTHERWISE:
                raise
            await self._jetstream.update_stream(config)


def _stream_name(name: str) -> str:
    """A queue's name as the server allows it; two names never become one."""
    clean = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")
    if not clean:
        raise ConfigError(f"prefill queue name {name!r} has no letter or digit; name it after the model.")
    return clean if clean == name else f"{clean}_{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"


def describe(error: BaseException) -> str:
    """What went wrong, in words, whichever way the client library says it."""
    description = getattr(error, "description", None)
    return str(description or error or type(error).__name__).rstrip(".")


def is_missing(error: BaseException | None) -> bool:
    """Whether the server has forgotten the stream: it was restarted without its data."""
    from nats.js.errors import NoStreamResponseError, ServiceUnavailableError

    if isinstance(error, NoStreamResponseError | ServiceUnavailableError):
        return True
    return getattr(error, "err_code", None) in _NO_SUCH_STREAM


def level_of(subject: str) -> int:
    """The level in a task's subject."""
    return int(subject.rpartition(".")[2]) - TOP_PRIORITY


def _level(level: int) -> int:
    return level + TOP_PRIORITY


def _consumer(level: int) -> str:
    return f"level{_level(level)}"


def _token(task_id: str) -> str:
    """A task id as one token of a subject, whatever characters it has."""
    return hashlib.blake2b(task_id.encode(), digest_size=12).hexdigest()
