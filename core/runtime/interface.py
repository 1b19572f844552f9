"""The runtime: how services find and call each other, whether they share a process or not.

Two implementations, `local` and `distributed`, pass one test suite (`tests/runtime`). What is said here holds for both;
a caller never has to know which one it is on. Payloads of events, keys and queues are bytes; requests and items of an
endpoint are msgspec structs or plain msgpack-able data, and callers must not change them after handing them over,
because the local runtime hands over the very object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import msgspec

from core.messages import EngineError, RequestContext, Unavailable


class NoInstance(Unavailable):
    """Nobody serves the endpoint now. It may come back: clients are told to retry."""


class InstanceGone(EngineError):
    """The instance that was asked for has left. Another may serve the request."""

    retryable = True


class Address(msgspec.Struct, frozen=True):
    """Names an endpoint, whoever serves it."""

    namespace: str
    """One deployment."""
    component: str
    """A service's name."""
    endpoint: str
    """May contain slashes: "chat/completions"."""

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.endpoint}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """`namespace.Component.endpoint`. Raises `ValueError` when a part is missing."""
        parts = text.split(".", 2)
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"'{text}' is no address; expected namespace.Component.endpoint")
        return cls(*parts)


class Instance(msgspec.Struct, frozen=True):
    """One replica that serves an endpoint."""

    id: str
    """The replica's id: unique in the namespace, the same for all endpoints of one replica."""
    address: Address
    metadata: bytes = b""
    """What the replica says of itself, encoded by the service that knows the type."""


class Balance(StrEnum):
    """How a client chooses among live instances."""

    ROUND_ROBIN = "round-robin"
    RANDOM = "random"


class InstanceEvent(msgspec.Struct, frozen=True):
    """An instance came (or changed its metadata), or left."""

    instance: Instance
    live: bool


class KeyEvent(msgspec.Struct, frozen=True):
    """A key was put, or deleted (`value` is None)."""

    key: str
    value: bytes | None


Handler = Callable[[Any, RequestContext], AsyncIterator[Any]]
"""Serves one request: gives the stream of its items. Called once a request."""


class Served(ABC):
    """One endpoint that this process serves. Its owner ends it with `close`."""

    instance: Instance

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Streams that were begun and have not ended."""

    @abstractmethod
    async def withdraw(self) -> None:
        """Take no new calls: clients stop seeing the instance. Running streams go on. Idempotent."""

    @abstractmethod
    async def drain(self) -> None:
        """Withdraw and wait until no stream is left. Give up with `asyncio.timeout`."""

    @abstractmethod
    async def close(self) -> None:
        """Withdraw without waiting. Idempotent. Running streams end with the service that produces them."""


class Client(ABC):
    """Calls one endpoint on whichever instances serve it."""

    address: Address

    @abstractmethod
    def instances(self) -> list[Instance]:
        """The live instances now, in the order in which they came. Cheap; the caller may keep the list."""

    @abstractmethod
    def watch(self) -> AsyncGenerator[InstanceEvent, None]:
        """The instances there are, as events, then every later change, for as long as the caller iterates."""

    @abstractmethod
    async def wait_for_instances(self, count: int = 1) -> list[Instance]:
        """Return when at least `count` instances are live. Give up with `asyncio.timeout`."""

    @abstractmethod
    def stream(self, request: Any, context: RequestContext, instance: str | None = None) -> AsyncGenerator[Any, None]:
        """Call the endpoint and give its items as they come.

        Without `instance` the client chooses a live one by its `balance`. An instance that fails with a retryable error
        before its first item is replaced, once, by another, if there is one. With `instance`, that one or nobody.

        Closing the generator closes the handler's stream. Raises, before the first item: `NoInstance`, and
        `InstanceGone` for an `instance` that is not live. At any time: what the handler raises.
        """


class Subscription(ABC):
    """Messages of one subject, in the order of each publisher. Iterate; end it with `close`."""

    dropped: int
    """Messages that this subscriber was too slow for. Consumers that must not lose any compare sequence numbers."""

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        """Gives (subject, payload)."""

    @abstractmethod
    async def close(self) -> None:
        """End the iteration. Idempotent."""


class Lease(ABC):
    """Keeps keys for as long as their owner lives."""

    @abstractmethod
    async def revoke(self) -> None:
        """Delete every key that was put under this lease. Idempotent."""


class KeyValue(ABC):
    """Small shared facts: configuration that may change at run time, addresses, registrations."""

    @abstractmethod
    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        """Set a key. With a lease, the key goes when the lease is revoked or its owner dies."""

    @abstractmethod
    async def get(self, key: str) -> bytes | None:
        """The value; None when there is none."""

    @abstractmethod
    async def delete(self, key: str) -> bool:
        """Whether there was such a key."""

    @abstractmethod
    async def items(self, prefix: str) -> dict[str, bytes]:
        """Keys that begin with `prefix`, in order, with their values."""

    @abstractmethod
    def watch(self, prefix: str) -> AsyncGenerator[KeyEvent, None]:
        """The keys there are, as events, then every later change, for as long as the caller iterates."""

    @abstractmethod
    async def lease(self) -> Lease:
        """A lease that this process keeps alive until it is revoked."""


class QueueTask(ABC):
    """One delivery of a queued payload. Ends in exactly one of `ack` and `nack`; otherwise it is delivered again."""

    payload: bytes
    deliveries: int
    """1 for the first delivery."""

    @abstractmethod
    async def ack(self) -> bool:
        """Done: never deliver it again. False when the delivery had timed out and the task is somebody else's."""

    @abstractmethod
    async def nack(self, delay: float = 0.0) -> bool:
        """Give it back, to be delivered again after `delay` seconds. False as `ack`."""

    @abstractmethod
    async def in_progress(self) -> bool:
        """Restart the time after which it would be delivered again. False as `ack`."""


class WorkQueue(ABC):
    """Tasks that are each done by one consumer, first come first served."""

    name: str

    @abstractmethod
    async def put(self, payload: bytes) -> None:
        """Append a task."""

    @abstractmethod
    async def get(self) -> QueueTask:
        """Take the oldest task, waiting for one. A cancelled wait takes none."""

    @abstractmethod
    async def depth(self) -> int:
        """Tasks waiting; those that were taken and not acknowledged are not counted."""


class Runtime(ABC):
    """A process's connection to its deployment. `async with` ends everything that was made through it."""

    @abstractmethod
    async def serve(self, address: Address, handler: Handler, *, instance: str, metadata: bytes = b"") -> Served:
        """Let others call `handler` at `address`. Raises `ValueError` when `instance` serves the address already."""

    @abstractmethod
    def client(self, address: Address, *, balance: Balance = Balance.ROUND_ROBIN) -> Client:
        """A client of an endpoint, whether anybody serves it yet or not."""

    @abstractmethod
    async def publish(self, subject: str, payload: bytes) -> None:
        """Send a message to everyone subscribed to `subject` now. Never waits for a subscriber."""

    @abstractmethod
    async def subscribe(self, subject: str) -> Subscription:
        """Receive what is published from now on. A last part `>` takes every longer subject: "kv_events.>"."""

    @property
    @abstractmethod
    def keys(self) -> KeyValue:
        """The deployment's key-value store."""

    @abstractmethod
    def queue(self, name: str, *, ack_wait: float = 60.0) -> WorkQueue:
        """The work queue of this name. A task not acknowledged within `ack_wait` seconds is delivered again."""

    @abstractmethod
    async def close(self) -> None:
        """Withdraw every endpoint, end subscriptions and watches, revoke leases. Idempotent."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raises `AssertionError` if the bookkeeping contradicts itself."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
