"""A worker's side of routing: publishes its KV events and its load for as long as a Router listens.

Nothing runs until a Router asks, and everything ends when none has asked for a while: a graph without a Router pays
nothing, and the engine is not even made to produce events.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from core.components.router_messages import EVENTS, INTEREST_SECONDS, LOADS, FeedRequest, LoadReport, subject
from core.engine import EngineHost
from core.kv import KvEventSource, KvUpdateBatch
from core.messages import EngineError, Load
from core.runtime import Runtime

log = logging.getLogger("dynamo.worker")

LOAD_SECONDS = 0.1
"""Between two looks at the engine's load; it is published only when it changed."""
HEARTBEAT_SECONDS = 2.0
"""A stream that was quiet for this long says so: whoever missed the last message notices."""

_encode = msgspec.msgpack.Encoder().encode


class KvPublisher:
    """Publishes what Routers need to know of one worker. Its owner ends it with `close`."""

    def __init__(
        self,
        host: EngineHost,
        worker: str,
        runtime: Runtime,
        namespace: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`host` has started. Nothing is published yet."""
        self._host = host
        self._worker = worker
        self._runtime = runtime
        self._clock = clock
        self._events_subject = subject(namespace, EVENTS, worker)
        self._loads_subject = subject(namespace, LOADS, worker)
        self._source: KvEventSource | None = None
        self._events: asyncio.Task[None] | None = None
        self._loads: asyncio.Task[None] | None = None
        self._interest = 0.0
        """When the last Router's interest runs out."""
        self._said_load: tuple[float, list[Load]] = (0.0, [])
        self._said_events = 0.0
        self._mirroring = False
        self._closed = False

    @property
    def active(self) -> bool:
        """Whether anything is published now."""
        return self._loads is not None

    def answer(self, request: FeedRequest) -> list[bytes]:
        """Publishes from now on what is wanted, and gives, encoded, what the Router misses."""
        if self._closed:
            return []
        self._interest = self._clock() + INTEREST_SECONDS
        if self._loads is None:
            self._loads = self._spawn(self._publish_loads(), "load", self._loads_ended)
        if not request.events:
            return []
        source = self._read_events()
        if source is None or request.replay is None:
            return []
        return [_encode(message) for message in source.answer(request.replay)]

    def mirror(self) -> None:
        """Follow the engine's cache from now on, whether a Router listens or not, so that `held` knows."""
        self._mirroring = True
        self._read_events()

    def held(self, blocks: Sequence[int]) -> int:
        """How many of a prompt's blocks (`core.kv.hashing`), from its first on, the engine has; 0 when unknown."""
        return 0 if self._source is None else self._source.prefix(blocks)

    async def close(self) -> None:
        """Ends everything. Idempotent."""
        self._closed = True
        tasks = [task for task in (self._events, self._loads) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _read_events(self) -> KvEventSource | None:
        """What is read from the engine's stream; None for an engine without one."""
        info = self._host.info
        if not info.block_size or not self._host.description.capabilities.kv_events:
            return None
        if self._source is None:
            # A source lasts as long as one reading of the engine's stream; the next has a later epoch, so that
            # Routers drop what they knew.
            self._source = KvEventSource(self._worker, info.block_size)
            self._events = self._spawn(self._publish_events(self._source), "KV events", self._events_ended)
        return self._source

    def _spawn(
        self, work: Coroutine[Any, Any, None], what: str, ended: Callable[[asyncio.Task[None]], None]
    ) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"{what} of {self._worker}")
        task.add_done_callback(ended)
        return task

    def _events_ended(self, task: asyncio.Task[None]) -> None:
        self._source = self._events = None

    def _loads_ended(self, task: asyncio.Task[None]) -> None:
        self._loads = None
        if self._events is not None and not self._mirroring:
            self._events.cancel()

    async def _publish_events(self, source: KvEventSource) -> None:
        events = self._host.kv_events()
        assert events is not None, "asked for only where the engine has them"
        try:
            async for engine_batch in events:
                for batch in source.ingest(engine_batch):
                    if self.active:
                        await self._publish_batch(batch)
        except EngineError as error:
            log.info("%s: the engine's KV events ended: %s", self._worker, error)
        except Exception:
            log.exception("%s: KV events stopped; they begin anew when a Router asks again", self._worker)
        finally:
            if hasattr(events, "aclose"):
                await events.aclose()

    async def _publish_loads(self) -> None:
        try:
            while self._clock() < self._interest:
                await self._beat()
                await asyncio.sleep(LOAD_SECONDS)
            log.info("%s: no Router listens any more", self._worker)
        except EngineError as error:
            log.info("%s: the engine's load ended: %s", self._worker, error)
        except Exception:
            log.exception("%s: load reports stopped; they begin anew when a Router asks again", self._worker)

    async def _beat(self) -> None:
        now = self._clock()
        said, known = self._said_load
        loads = self._host.load()
        if loads != known or now - said >= HEARTBEAT_SECONDS:
            self._said_load = (now, loads)
            await self._runtime.publish(self._loads_subject, _encode(LoadReport(self._worker, loads)))
        if self._source is not None and now - self._said_events >= HEARTBEAT_SECONDS:
            for rank in self._source.ranks:
                await self._publish_batch(self._source.heartbeat(rank))

    async def _publish_batch(self, batch: KvUpdateBatch) -> None:
        self._said_events = self._clock()
        await self._runtime.publish(self._events_subject, _encode(batch))

    def check_integrity(self) -> None:
        """Raises `AssertionError` when something runs without its counterpart."""
        assert (self._source is None) == (self._events is None), "a source has no reader, or a reader no source"
        if self._source is not None:
            self._source.check_integrity()
        assert not self._closed or (self._loads is None and self._events is None), "closed, and something runs"
