"""The key-value store within the process."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from core.runtime.interface import KeyEvent, KeyValue, Lease
from core.runtime.local.channel import Channel, Closed


class LocalLease(Lease):
    """Its owner is this process, so it never expires by itself."""

    def __init__(self, store: LocalKeys) -> None:
        self.keys: set[str] = set()
        self.revoked = False
        self._store = store

    async def revoke(self) -> None:
        self.revoked = True
        for key in sorted(self.keys):
            await self._store.delete(key)


class LocalKeys(KeyValue):
    """See `KeyValue`."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._leases: dict[str, LocalLease] = {}
        self._watchers: dict[Channel[KeyEvent], str] = {}

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        self._unlease(key)
        if lease is not None:
            assert isinstance(lease, LocalLease)
            if lease.revoked:
                raise ValueError(f"key '{key}': the lease has been revoked")
            lease.keys.add(key)
            self._leases[key] = lease
        self._values[key] = value
        self._tell(KeyEvent(key, value))

    async def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    async def delete(self, key: str) -> bool:
        self._unlease(key)
        if self._values.pop(key, None) is None:
            return False
        self._tell(KeyEvent(key, None))
        return True

    async def items(self, prefix: str) -> dict[str, bytes]:
        return {key: self._values[key] for key in sorted(self._values) if key.startswith(prefix)}

    async def watch(self, prefix: str) -> AsyncGenerator[KeyEvent, None]:
        channel: Channel[KeyEvent] = Channel()
        for key, value in (await self.items(prefix)).items():
            channel.put(KeyEvent(key, value))
        self._watchers[channel] = prefix
        try:
            while True:
                yield await channel.get()
        except Closed:
            return
        finally:
            self._watchers.pop(channel, None)

    async def lease(self) -> Lease:
        return LocalLease(self)

    def close(self) -> None:
        """End every watch."""
        for channel in self._watchers:
            channel.close()

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a lease and its keys disagree."""
        for key, lease in self._leases.items():
            assert key in self._values, key
            assert key in lease.keys, key

    def _unlease(self, key: str) -> None:
        lease = self._leases.pop(key, None)
        if lease is not None:
            lease.keys.discard(key)

    def _tell(self, event: KeyEvent) -> None:
        for channel, prefix in self._watchers.items():
            if event.key.startswith(prefix):
                channel.put(event)
