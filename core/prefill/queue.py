"""The prefill queue: tasks wait here until a prefill worker has room; none is lost, and none is served twice for good.

A task that was taken stays the taker's for as long as it lives; when it dies, the task is delivered to another. It
leaves the queue for good by `ack` (its KV was imported, or the decode side let go), by `cancel`, or as a dead letter
after `max_attempts` tries, of which the taker tells the decode side. Implementations: `core/prefill/local_queue.py`
(one process) and `core/prefill/nats_queue.py` (JetStream); both pass one test suite.

Order: higher level first; within a level first come first served, but for two liberties that a taker has among the
first `window` tasks that wait: it prefers the one whose prefix it holds most of, and it passes over one that it has no
room for. Nobody is overtaken more than `max_overtakes` times: after that the task goes first, and whoever has no room
for it waits until it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from core.messages.errors import ConfigError, EngineError, Overloaded
from core.prefill.messages import PrefillTask

Prefers = Callable[[PrefillTask], int]
"""How many of the task's prompt tokens the taker holds already. Cheap; called for every task in the window."""


class QueueSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a queue behaves; the same for everyone who uses it. Seconds and tasks."""

    capacity: int = 1024
    """Tasks that are not acknowledged yet; more are refused with `Overloaded`."""
    ack_wait: float = 5.0
    """A taker that shows no sign of life for so long is dead. Signs are sent by themselves, thrice as often."""
    max_attempts: int = 3
    """Tries, after which a task is a dead letter."""
    window: int = 8
    """How many waiting tasks a taker looks at."""
    max_overtakes: int = 4
    """How often a task lets later ones of its level pass."""
    retry_delay: float = 0.1
    """Before a failed task is delivered again."""

    def __post_init__(self) -> None:
        for name, least in (("capacity", 1), ("max_attempts", 1), ("window", 1), ("max_overtakes", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"prefill queue: {name.replace('_', '-')} is {value}; it must be at least {least}.")
        if not self.ack_wait > 0 or self.retry_delay < 0:
            raise ConfigError(
                f"prefill queue: ack-wait is {self.ack_wait:g} s and retry-delay {self.retry_delay:g} s; "
                "the first must be above 0, the second not below."
            )


class Room(NamedTuple):
    """What a taker has room for now."""

    tasks: int
    tokens: int
    """Prompt tokens, all tasks together."""
    idle: bool = False
    """Nothing runs: one task fits, however long; what is longer than the engine can bear, the engine refuses."""


class QueueUnavailable(EngineError):
    """The queue cannot be reached now; the prompt can be prefilled without it."""

    retryable = True


class TaskTooLarge(EngineError):
    """The queue's server takes no message so large; the prompt can be prefilled without it."""


class QueueCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What went through one process's end of the queue."""

    submitted: int = 0
    refused: int = 0
    """Not queued: full."""
    cancelled: int = 0
    taken: int = 0
    acknowledged: int = 0
    retried: int = 0
    returned: int = 0
    dead: int = 0
    overtaken: int = 0
    """Times that a task was passed over for a later one."""


class Taken(ABC):
    """A task in a taker's hands. Ends in exactly one of `ack`, `retry`, `give_back`, `bury`; later calls do nothing."""

    task: PrefillTask
    attempt: int
    """1 for the first try. Tries that ended in silence count."""
    delivery: int
    """Larger than that of every earlier delivery of the task, so that a message of an earlier one is known as such."""
    silent: bool
    """Whether every try before this one ended in silence."""

    @property
    def exhausted(self) -> bool:
        """All tries were used up before this one: tell the decode side and `bury` it, do not run it."""
        return self.attempt > self.max_attempts

    @property
    def last(self) -> bool:
        """No further try comes after this one."""
        return self.attempt >= self.max_attempts

    max_attempts: int

    @abstractmethod
    async def ack(self) -> None:
        """Done: it leaves the queue."""

    @abstractmethod
    async def retry(self) -> None:
        """This try failed; deliver it again after `retry_delay`."""

    @abstractmethod
    async def give_back(self) -> None:
        """Deliver it to somebody else, at once, as if it had never been taken."""

    @abstractmethod
    async def bury(self, reason: str) -> None:
        """It becomes a dead letter, kept with the reason for an operator to look at."""


class Taker(ABC):
    """One prefill worker's end of the queue. `async with`: gives back what it still has."""

    @abstractmethod
    async def take(self, room: Room, wait: float, prefers: Prefers | None = None) -> list[Taken]:
        """Tasks that fit into `room`, at least one unless none came within `wait` seconds. A cancelled wait takes none.

        Raises `QueueUnavailable`.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give back what was taken and not ended. Idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class DeadLetter(msgspec.Struct, frozen=True):
    """A task that nobody could serve."""

    task: PrefillTask
    reason: str
    attempts: int


class PrefillQueue(ABC):
    """The queue, as both sides see it."""

    def __init__(self, settings: QueueSettings | None = None) -> None:
        self.settings = settings or QueueSettings()
        self._counts = QueueCounts()
        self._waited = 1.0

    @abstractmethod
    async def submit(self, task: PrefillTask) -> None:
        """Append a task. Submitting a task id that is queued already changes nothing.

        Raises `Overloaded` when the queue is full, `TaskTooLarge`, `QueueUnavailable`. After `QueueUnavailable` the
        task may be queued nevertheless.
        """

    @abstractmethod
    async def cancel(self, task_id: str) -> None:
        """Nobody waits any more for a task that this process submitted: it is not delivered again. Whoever has taken it
        may finish. Idempotent, and no error when it has gone or the queue cannot be reached: takers ask before they
        work.
        """

    @abstractmethod
    async def depth(self) -> int:
        """Tasks that wait for a taker, as far as is known; at most a moment old. Raises `QueueUnavailable`."""

    @abstractmethod
    def taker(self, worker_id: str) -> Taker:
        """An end for a prefill worker."""

    @abstractmethod
    async def dead_letters(self) -> list[DeadLetter]:
        """The latest dead letters, oldest first. Raises `QueueUnavailable`."""

    def counts(self) -> QueueCounts:
        """Figures of this process, for metrics."""
        return self._counts

    def count(self, **more: int) -> None:
        """Add to the figures."""
        for name, value in more.items():
            if value:
                self._counts = msgspec.structs.replace(self._counts, **{name: getattr(self._counts, name) + value})

    def observe_wait(self, seconds: float) -> None:
        """The decode side saw a task wait so long for its taker: what the next refused one is told to wait."""
        self._waited += 0.2 * (seconds - self._waited)

    def full(self) -> Overloaded:
        """The error of a queue that takes no more."""
        retry_after = min(30.0, max(0.1, self._waited))
        self.count(refused=1)
        return Overloaded(
            f"The prefill queue is full: {self.settings.capacity} tasks are waiting or being prefilled. "
            f"Try again in {retry_after:.1f} s, or add prefill workers.",
            retry_after=retry_after,
        )

    @abstractmethod
    async def close(self) -> None:
        """End what this process runs for the queue. Waiting takes raise `QueueUnavailable`. Idempotent."""


class Waiting(NamedTuple):
    """A waiting task, as `choose` sees it."""

    task: PrefillTask
    overtaken: int


class Choice(NamedTuple):
    """What to take of the waiting tasks, as indices, in the order of preference."""

    taken: list[int]
    passes: list[int]
    """For every waiting task, how many of the taken ones overtook it."""


def choose(waiting: Sequence[Waiting], room: Room, prefers: Prefers | None, max_overtakes: int) -> Choice:
    """Which of the waiting tasks of one level, oldest first, a taker gets. Pure."""
    held = [prefers(item.task) if prefers is not None else 0 for item in waiting]
    taken: list[int] = []
    passes = [0] * len(waiting)
    tokens, idle = room.tokens, room.idle
    left = list(range(len(waiting)))
    while left and len(taken) < room.tasks:
        stop = next((at for at, i in enumerate(left) if waiting[i].overtaken + passes[i] >= max_overtakes), len(left))
        allowed = [i for i in left[: stop + 1] if waiting[i].task.tokens <= tokens or idle]
        if not allowed:
            break
        best = max(allowed, key=lambda i: (held[i], -i))
        for i in left:
            if i < best:
                passes[i] += 1
        left.remove(best)
        taken.append(best)
        tokens, idle = tokens - waiting[best].task.tokens, False
    return Choice(taken, passes)
