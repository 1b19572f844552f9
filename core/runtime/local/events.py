"""Publish and subscribe within the process."""

from __future__ import annotations

from collections.abc import AsyncIterator

from core.runtime.interface import Subscription
from core.runtime.local.channel import Channel, Closed

BOUND = 65_536
"""Messages a subscriber may lag behind before its oldest are dropped."""


class Events:
    """Subscribers by subject."""

    def __init__(self) -> None:
        self._exact: dict[str, set[LocalSubscription]] = {}
        self._longer: dict[str, set[LocalSubscription]] = {}

    def publish(self, subject: str, payload: bytes) -> None:
        """To the subject's subscribers, and to those of every `prefix.>` that it begins with."""
        for subscription in self._exact.get(subject, ()):
            subscription.channel.put((subject, payload))
        if self._longer:
            for prefix, subscriptions in self._longer.items():
                if subject.startswith(prefix):
                    for subscription in subscriptions:
                        subscription.channel.put((subject, payload))

    def subscribe(self, subject: str) -> LocalSubscription:
        """Raises `ValueError` for a subject with a wildcard anywhere but at its end."""
        if "*" in subject or ">" in subject.removesuffix(".>"):
            raise ValueError(f"subject '{subject}': the only wildcard is a last part '>'")
        longer = subject.endswith(".>")
        group = (self._longer if longer else self._exact).setdefault(subject.removesuffix(">"), set())
        subscription = LocalSubscription(group)
        group.add(subscription)
        return subscription

    def close(self) -> None:
        """End every subscription."""
        for groups in (self._exact, self._longer):
            for group in groups.values():
                for subscription in list(group):
                    subscription.end()
            groups.clear()


class LocalSubscription(Subscription):
    """See `Subscription`."""

    def __init__(self, group: set[LocalSubscription]) -> None:
        self.channel: Channel[tuple[str, bytes]] = Channel(BOUND)
        self._group = group

    @property
    def dropped(self) -> int:  # type: ignore[override]  # read-only here
        return self.channel.dropped

    async def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        try:
            while True:
                yield await self.channel.get()
        except Closed:
            return

    def end(self) -> None:
        """Idempotent."""
        self._group.discard(self)
        self.channel.close()

    async def close(self) -> None:
        self.end()
