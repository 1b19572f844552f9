"""The HTTP paths about routing: what the Routers know, and where a prompt would go."""

from __future__ import annotations

import msgspec

from core.components.backend import ProcessorBackend
from core.components.router_messages import RouteRequest
from core.openai.endpoints import Call, Endpoint, Read, Surroundings
from core.openai.exchange import Exchange


def routing_endpoints(backend: ProcessorBackend, around: Surroundings) -> list[tuple[list[str], Endpoint]]:
    """`GET /routing/state` and `POST /routing/explain`, with their methods."""

    async def state(_: Exchange) -> tuple[int, bytes]:
        return 200, msgspec.json.encode(await backend.routing_state())

    return [
        (["GET"], Read("/routing/state", around, state)),
        (["POST"], Call("/routing/explain", around, RouteRequest, backend.explain_route)),
    ]
