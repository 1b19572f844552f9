"""The local runtime: owner of its endpoints, events, keys and queues."""

from __future__ import annotations

from core.runtime.interface import Address, Balance, Handler, Instance, KeyValue, Runtime, WorkQueue
from core.runtime.local.endpoints import Endpoint, LocalClient, LocalServed
from core.runtime.local.events import Events, LocalSubscription
from core.runtime.local.keys import LocalKeys
from core.runtime.local.queue import LocalQueue


class LocalRuntime(Runtime):
    """See `Runtime`. Belongs to the event loop in which it is used."""

    def __init__(self) -> None:
        self._endpoints: dict[Address, Endpoint] = {}
        self._events = Events()
        self._keys = LocalKeys()
        self._queues: dict[str, LocalQueue] = {}

    async def serve(self, address: Address, handler: Handler, *, instance: str, metadata: bytes = b"") -> LocalServed:
        endpoint = self._endpoint(address)
        served = LocalServed(endpoint, Instance(instance, address, metadata), handler)
        endpoint.add(served)
        return served

    def client(self, address: Address, *, balance: Balance = Balance.ROUND_ROBIN) -> LocalClient:
        return LocalClient(self._endpoint(address), balance)

    async def publish(self, subject: str, payload: bytes) -> None:
        self._events.publish(subject, payload)

    async def subscribe(self, subject: str) -> LocalSubscription:
        return self._events.subscribe(subject)

    @property
    def keys(self) -> KeyValue:
        return self._keys

    def queue(self, name: str, *, ack_wait: float = 60.0) -> WorkQueue:
        return self._queues.setdefault(name, LocalQueue(name, ack_wait))

    async def close(self) -> None:
        for endpoint in self._endpoints.values():
            for served in list(endpoint.live.values()):
                await served.close()
            for watcher in endpoint.watchers:
                watcher.close()
        self._events.close()
        self._keys.close()
        for queue in self._queues.values():
            queue.close()

    def check_integrity(self) -> None:
        for address, endpoint in self._endpoints.items():
            assert endpoint.address == address
            for instance, served in endpoint.live.items():
                assert served.instance.id == instance
                assert served.in_flight >= 0
        self._keys.check_integrity()
        for queue in self._queues.values():
            queue.check_integrity()

    def _endpoint(self, address: Address) -> Endpoint:
        endpoint = self._endpoints.get(address)
        if endpoint is None:
            endpoint = self._endpoints[address] = Endpoint(address)
        return endpoint
