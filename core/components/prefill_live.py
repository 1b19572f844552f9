"""Settings of disaggregated prefill that change while requests are served: one JSON object in the key-value store."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec

from core.components.prefill_keys import PrefillKeys
from core.messages import ConfigError, RequestRejected
from core.prefill.decision import LIVE, DisaggPolicy
from core.runtime import Runtime


class LiveSettings:
    """The changes in force, for everyone in the deployment. A change applies to the next request on every Worker."""

    def __init__(self, runtime: Runtime, namespace: str) -> None:
        self._keys = runtime.keys
        self._key = f"{namespace}/config/prefill"

    async def changes(self) -> dict[str, Any]:
        """What was changed since the configuration; a value of None is as configured."""
        value = await self._keys.get(self._key)
        return {} if value is None else msgspec.json.decode(value, type=dict[str, Any])

    async def change(self, values: Mapping[str, Any], configured: PrefillKeys) -> dict[str, Any]:
        """Change some settings; None restores what was configured. Gives all changes that there are then.

        Raises `RequestRejected`, with everything as it was, for a key that cannot be changed or a value that it cannot
        have.
        """
        given = {key.replace("_", "-"): value for key, value in values.items()}
        changes = await self.changes() | given
        in_force_with(configured, changes)
        await self._keys.put(self._key, msgspec.json.encode(changes))
        return changes

    async def follow(self) -> AsyncGenerator[bytes | None, None]:
        """The changes there are, then every later one, for `DisaggPolicy.follow`."""
        async with aclosing(self._keys.watch(self._key)) as events:
            async for event in events:
                if event.key == self._key:
                    yield event.value


def in_force_with(configured: PrefillKeys, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What can be changed, by key, with `changes`. Raises `RequestRejected` when they cannot be."""
    policy = DisaggPolicy(configured.disagg())
    try:
        policy.reconfigure(changes)
    except ConfigError as error:
        raise RequestRejected(str(error)) from error
    return shown(policy)


def shown(policy: DisaggPolicy) -> dict[str, Any]:
    """The settings in force, by their keys."""
    return {key: getattr(policy.settings, key.replace("-", "_")) for key in LIVE}
