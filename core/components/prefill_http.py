"""The HTTP paths about disaggregated prefill: what its workers do and hold, and its settings."""

from __future__ import annotations

import uuid
from contextlib import aclosing
from typing import Any

import msgspec

from core.components.prefill_keys import PrefillKeys
from core.components.prefill_live import LiveSettings, in_force_with
from core.components.prefill_messages import PrefillSettings, PrefillState
from core.components.prefill_pair import DECODER, PREFILLER
from core.graph.context import ServiceContext
from core.messages import RequestContext, RequestRejected
from core.openai.endpoints import Call, Endpoint, Read, Surroundings
from core.openai.exchange import Exchange
from core.runtime import Address, InstanceGone


class PrefillDoor:
    """Asks every worker, and changes settings for all of them."""

    def __init__(self, context: ServiceContext) -> None:
        """`context`: of the service that serves the paths."""
        self._context = context
        self._runtime = context.runtime
        self._namespace = context.settings.namespace
        self._live = LiveSettings(context.runtime, self._namespace)

    def endpoints(self, around: Surroundings) -> list[tuple[list[str], Endpoint]]:
        """`GET /prefill/state`, `GET` and `POST /prefill/settings`, with their methods."""

        async def state(_: Exchange) -> tuple[int, bytes]:
            return 200, msgspec.json.encode(await self.state())

        async def settings(_: Exchange) -> tuple[int, bytes]:
            return 200, msgspec.json.encode(await self.settings())

        return [
            (["GET"], Read("/prefill/state", around, state)),
            (["GET"], Read("/prefill/settings", around, settings)),
            (["POST"], Call("/prefill/settings", around, dict, self.change)),
        ]

    async def state(self) -> PrefillState:
        """What every worker does and holds. Raises `RequestRejected` in a graph without a PrefillWorker."""
        self._configured()
        return PrefillState(
            workers=await self._all(DECODER, "prefill_state"), prefill_workers=await self._all(PREFILLER, "state")
        )

    async def settings(self) -> PrefillSettings:
        """The settings in force. Raises as `state`."""
        return self._shown(await self._live.changes())

    async def change(self, values: dict[str, Any]) -> PrefillSettings:
        """Change settings by their keys; None restores what was configured. Raises `RequestRejected`."""
        return self._shown(await self._live.change(values, self._configured()))

    def _shown(self, changes: dict[str, Any]) -> PrefillSettings:
        configured = self._configured()
        return PrefillSettings(settings=in_force_with(configured, changes), configured=in_force_with(configured, {}))

    def _configured(self) -> PrefillKeys:
        services = self._context.settings.services
        if PREFILLER not in services or DECODER not in services:
            raise RequestRejected(
                f"{self._context.plan.name} has no PrefillWorker, so every Worker prefills by itself. "
                "Serve graphs.disagg or graphs.disagg_router for prefill elsewhere.",
                code="not_found",
            )
        config = services[DECODER].config
        assert isinstance(config, PrefillKeys)
        return config

    async def _all(self, service: str, endpoint: str) -> list[Any]:
        client = self._runtime.client(Address(self._namespace, service, endpoint))
        found = []
        for instance in client.instances():
            context = RequestContext(request_id=uuid.uuid4().hex)
            try:
                async with aclosing(client.stream(None, context, instance.id)) as items:
                    found.append(await anext(items))
            except InstanceGone:  # it left meanwhile
                continue
        return found
