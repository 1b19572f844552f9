"""Looks after all running requests at once: clients that left, clients that do not read, deadlines, idle connections.

One task looks at everything four times a second, so that a request which is answered faster than that pays nothing for
being watched: no timer, no task, no pending `receive`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Protocol

from core.messages import DeadlineExceeded, DynamoError
from core.openai.exchange import ClientGone, ClientStalled, Exchange

INTERVAL = 0.25
"""Seconds between looks: everything is noticed within twice that."""


class WatchedConnection(Protocol):
    """A connection that may be waiting for a request."""

    @property
    def waiting_since(self) -> float | None:
        """`time.monotonic()` since when a request is incomplete; None while there is none or it is being answered."""

    def expire(self) -> None:
        """Closes the connection: its request does not come."""


class Watch:
    """Owns the looking task. Everything happens on the event loop it was first used on."""

    def __init__(self, *, slow_client_timeout: float, header_timeout: float) -> None:
        self._slow = slow_client_timeout
        self._header = header_timeout
        self.active: set[Exchange] = set()
        """Requests being answered."""
        self.connections: Iterable[WatchedConnection] = ()
        """Set by the server."""
        self._task: asyncio.Task[None] | None = None
        self._watchers: set[asyncio.Task[None]] = set()

    def enter(self, exchange: Exchange) -> None:
        """Begins to watch a request."""
        self.active.add(exchange)
        if self._task is None:
            self.start()

    def leave(self, exchange: Exchange) -> None:
        """Ends watching it."""
        self.active.discard(exchange)
        if exchange.watcher is not None:
            exchange.watcher.cancel()
            exchange.watcher = None

    def start(self) -> None:
        """Begins to look. Idempotent; the first request does it too."""
        if self._task is None:
            self._task = asyncio.create_task(self._look_forever(), name="http-watch")

    def interrupt_all(self, reason: DynamoError) -> None:
        """Ends every running request with this error."""
        for exchange in list(self.active):
            exchange.interrupt(reason)

    async def close(self) -> None:
        """Ends the looking. Idempotent; a later request would start it again."""
        tasks = [*self._watchers, *([self._task] if self._task is not None else [])]
        self._task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when something is watched that has ended."""
        for exchange in self.active:
            assert exchange.watcher is None or exchange.watcher in self._watchers, "a watcher without an owner"

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            now = time.monotonic()
            for exchange in list(self.active):
                self._look(exchange, now)
            for connection in list(self.connections):
                since = connection.waiting_since
                if since is not None and now - since > self._header:
                    connection.expire()

    def _look(self, exchange: Exchange, now: float) -> None:
        if now > exchange.deadline:
            late = exchange.late or DeadlineExceeded("The request's time is used up.")
            exchange.deadline = float("inf")
            exchange.interrupt(late)
        elif exchange.sending:
            if exchange.stalled is None or exchange.stalled[0] != exchange.pieces:
                exchange.stalled = (exchange.pieces, now)
            elif now - exchange.stalled[1] > self._slow:
                exchange.interrupt(ClientStalled("the client does not read its answer"))
        if exchange.watcher is None and not exchange.reading:  # while the body is read, a disconnect is seen anyway
            watcher = asyncio.create_task(_until_gone(exchange), name="http-disconnect")
            exchange.watcher = watcher
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)


async def _until_gone(exchange: Exchange) -> None:
    while (await exchange.receive())["type"] != "http.disconnect":
        pass
    exchange.interrupt(ClientGone("the client left"))
