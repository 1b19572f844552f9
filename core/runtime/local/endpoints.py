"""Endpoints of the local runtime: a call is a method call, and items are handed through as they are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from typing import Any

from core.messages import EngineError, RequestContext
from core.runtime.interface import (
    Address,
    Balance,
    Client,
    Handler,
    Instance,
    InstanceEvent,
    InstanceGone,
    NoInstance,
    Served,
)
from core.runtime.local.channel import Channel, Closed


class Endpoint:
    """All instances at one address, and everybody who watches them."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.live: dict[str, LocalServed] = {}
        self.watchers: set[Channel[InstanceEvent]] = set()
        self._turn = 0

    def add(self, served: LocalServed) -> None:
        """Raises `ValueError` when the instance is there already."""
        if served.instance.id in self.live:
            raise ValueError(f"instance {served.instance.id} serves {self.address} already")
        self.live[served.instance.id] = served
        self._tell(InstanceEvent(served.instance, live=True))

    def remove(self, served: LocalServed) -> None:
        """Nothing happens when it has been removed."""
        if self.live.get(served.instance.id) is served:
            del self.live[served.instance.id]
            self._tell(InstanceEvent(served.instance, live=False))

    def next(self, balance: Balance, after: LocalServed | None = None) -> LocalServed | None:
        """An instance chosen by `balance`; never `after`. None when there is no other."""
        candidates = [served for served in self.live.values() if served is not after]
        if not candidates:
            return None
        if balance is Balance.RANDOM:
            return random.choice(candidates)
        chosen = candidates[self._turn % len(candidates)]
        self._turn += 1
        return chosen

    def _tell(self, event: InstanceEvent) -> None:
        for watcher in self.watchers:
            watcher.put(event)


class LocalServed(Served):
    """See `Served`."""

    def __init__(self, endpoint: Endpoint, instance: Instance, handler: Handler) -> None:
        self.instance = instance
        self.handler = handler
        self.streams = 0
        self._endpoint = endpoint
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        return self.streams

    @property
    def is_live(self) -> bool:
        """Whether clients can choose it."""
        return self._endpoint.live.get(self.instance.id) is self

    def begin(self) -> None:
        """Count a stream."""
        self.streams += 1
        self._idle.clear()

    def end(self) -> None:
        """Count a stream's end."""
        self.streams -= 1
        if not self.streams:
            self._idle.set()

    async def withdraw(self) -> None:
        self._endpoint.remove(self)

    async def drain(self) -> None:
        await self.withdraw()
        await self._idle.wait()

    async def close(self) -> None:
        await self.withdraw()


class LocalClient(Client):
    """See `Client`."""

    def __init__(self, endpoint: Endpoint, balance: Balance) -> None:
        self.address = endpoint.address
        self._balance = balance
        self._endpoint = endpoint

    def instances(self) -> list[Instance]:
        return [served.instance for served in self._endpoint.live.values()]

    async def watch(self) -> AsyncGenerator[InstanceEvent, None]:
        channel: Channel[InstanceEvent] = Channel()
        for instance in self.instances():
            channel.put(InstanceEvent(instance, live=True))
        self._endpoint.watchers.add(channel)
        try:
            while True:
                yield await channel.get()
        except Closed:
            return
        finally:
            self._endpoint.watchers.discard(channel)

    async def wait_for_instances(self, count: int = 1) -> list[Instance]:
        channel: Channel[InstanceEvent] = Channel()
        self._endpoint.watchers.add(channel)
        try:
            while len(self._endpoint.live) < count:
                await channel.get()
        finally:
            self._endpoint.watchers.discard(channel)
        return self.instances()

    async def stream(
        self, request: Any, context: RequestContext, instance: str | None = None
    ) -> AsyncGenerator[Any, None]:
        served = self._choose(instance)
        replaceable = instance is None
        while True:
            items = None
            served.begin()
            try:
                items = served.handler(request, context)
                async for item in items:
                    replaceable = False
                    yield item
                return
            except EngineError as error:
                other = self._endpoint.next(self._balance, after=served) if replaceable and error.retryable else None
                if other is None:
                    raise
            finally:
                if items is not None and hasattr(items, "aclose"):
                    await items.aclose()
                served.end()
            served, replaceable = other, False

    def _choose(self, instance: str | None) -> LocalServed:
        if instance is None:
            chosen = self._endpoint.next(self._balance)
            if chosen is None:
                raise NoInstance(f"nobody serves {self.address} now; try again in a moment")
            return chosen
        served = self._endpoint.live.get(instance)
        if served is None:
            raise InstanceGone(f"instance {instance} no longer serves {self.address}")
        return served
