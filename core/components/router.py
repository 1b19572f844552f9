"""The router: chooses the worker for each request by what the workers hold and how busy they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from msgspec import Meta

from core.components import keys
from core.components.worker import Worker
from core.graph import Service, ServiceConfig, depends, endpoint, service
from core.graph.config import Follows
from core.messages import Delta, EngineRequest, RequestContext


class RouterConfig(ServiceConfig, frozen=True, kw_only=True):
    """Keys of the Router."""

    min_workers: keys.Positive = 1
    """Workers that must be live before requests are taken."""
    router: Annotated[str, Follows("Processor")] = "kv"
    """Policy by which a worker is chosen."""
    kv_hit_weight: Annotated[float, Meta(ge=0), Follows("Processor")] = 1.0
    """Weight of the fraction of the prompt that a worker holds."""
    load_weight: Annotated[float, Meta(ge=0), Follows("Processor")] = 0.5
    """Weight of a worker's load relative to the others'."""
    router_num_threads: Annotated[int, Meta(ge=1), Follows("Processor")] = 4
    """Threads that look up prefixes."""
    model: keys.ModelOfWorker = ""
    """The Worker's model."""
    block_size: keys.BlockSizeOfWorker = None
    """Tokens in a KV block; the Worker's."""


@service(abstract=True)
class Router(Service):
    """What a router offers to the Processor: the Worker's stream, from the worker that it chose."""

    Config = RouterConfig
    config: RouterConfig
    worker = depends(Worker)

    @endpoint()
    def generate(self, request: EngineRequest, context: RequestContext) -> AsyncIterator[Delta]:
        """Generate on the chosen worker."""
        raise NotImplementedError
