"""The queues under test behind one door: what differs between them is how they are made and how a worker dies."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod

import nats

from core.messages import EngineRequest, Rendezvous, StopConditions
from core.prefill.local_queue import LocalQueue
from core.prefill.messages import PrefillTask
from core.prefill.nats_queue import NatsQueue
from core.prefill.queue import PrefillQueue, QueueSettings, Room, Taker

PLENTY = Room(64, 1 << 20)
ONE = Room(1, 1 << 20)
_numbers = itertools.count()


def make_task(name: str, *, tokens: int = 8, priority: int = 0, prefix: int = 1) -> PrefillTask:
    request = EngineRequest(
        request_id=name, token_ids=[prefix] * tokens, stop=StopConditions(max_tokens=4), priority=priority
    )
    return PrefillTask(
        task_id=name, request=request, decode_worker="d0", reply_to="box.d0", rendezvous=(Rendezvous.PULL,)
    )


class QueueHouse(ABC):
    """One queue with as many ends as a test wants."""

    @abstractmethod
    async def queue(self, settings: QueueSettings) -> PrefillQueue: ...

    @abstractmethod
    async def taker(self, name: str) -> Taker:
        """An end in a process of its own, as far as the queue can see."""

    @abstractmethod
    async def die(self, taker: Taker) -> None:
        """The taker's process is gone, without a word."""

    @abstractmethod
    async def close(self) -> None: ...


class LocalHouse(QueueHouse):
    async def queue(self, settings: QueueSettings) -> PrefillQueue:
        self._queue = LocalQueue(settings)
        return self._queue

    async def taker(self, name: str) -> Taker:
        return self._queue.taker(name)

    async def die(self, taker: Taker) -> None:
        await taker.lose()

    async def close(self) -> None:
        self._queue.check_integrity()
        await self._queue.close()


class NatsHouse(QueueHouse):
    def __init__(self, url: str) -> None:
        self._url = url
        self._name = f"prefill test/{next(_numbers)}"
        self._clients = []
        self._takers = []

    async def connect(self):
        client = await nats.connect(self._url, reconnect_time_wait=0.05, max_reconnect_attempts=-1)
        self._clients.append(client)
        return client

    async def queue(self, settings: QueueSettings) -> PrefillQueue:
        self._settings = settings
        queue = NatsQueue(await self.connect(), self._name, settings)
        await queue.open()
        return queue

    async def taker(self, name: str) -> Taker:
        client = await self.connect()
        taker = NatsQueue(client, self._name, self._settings).taker(name)
        self._takers.append((taker, client))
        return taker

    async def die(self, taker: Taker) -> None:
        client = next(client for known, client in self._takers if known is taker)
        await client.close()

    async def close(self) -> None:
        for taker, client in self._takers:
            if not client.is_closed:
                await taker.close()
            else:
                taker._keeping.cancel()
        for client in self._clients:
            await client.close()
