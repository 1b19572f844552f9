"""One running instance of a service: constructed, started, served, drained, stopped."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from core.engine import EngineRegistry
from core.graph.client import ServiceClient
from core.graph.config import Settings
from core.graph.context import ServiceContext
from core.graph.plan import Node, Plan
from core.graph.service import EndpointSpec
from core.messages import RequestContext
from core.observe import Metrics
from core.runtime import Address, Handler, Runtime, Served

logger = logging.getLogger("dynamo.graph")


class Replica:
    """Owns one instance of a service class and its endpoints. `stop` ends everything that `start` began."""

    def __init__(
        self,
        node: Node,
        index: int,
        plan: Plan,
        settings: Settings,
        runtime: Runtime,
        engines: EngineRegistry,
        metrics: Metrics,
        report: Callable[[str], None],
        announce: Callable[[str], None],
        gpus: tuple[int, ...] = (),
    ) -> None:
        self.node = node
        self.index = index
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Resolved with the reason when the service says that it cannot serve any more."""
        self._served: list[Served] = []
        self._service: Any = None
        self._config = settings.services[node.name].config
        self._runtime = runtime
        self.context = ServiceContext(
            service=node.name,
            replica=index,
            instance=f"{node.name}-{index}-{uuid.uuid4().hex[:6]}",
            args=settings.services[node.name].args,
            plan=plan,
            settings=settings,
            runtime=runtime,
            engines=engines,
            clients={
                attribute: ServiceClient(runtime, settings.namespace, plan.nodes[target].spec) if target else None
                for attribute, target in node.dependencies.items()
            },
            metrics=metrics,
            report=report,
            announce=announce,
            fail=self._fail,
            gpus=gpus,
        )

    @property
    def in_flight(self) -> int:
        """Streams that run on the replica's endpoints."""
        return sum(served.in_flight for served in self._served)

    async def start(self) -> None:
        """Construct the service, run its start hooks, then serve its endpoints. A failed start is cleaned up."""
        try:
            service: Any = object.__new__(self.node.cls)
            service.context = self.context
            service.config = self._config
            service.__init__()
            self._service = service
            for hook in self.node.spec.hooks.get("start", ()):
                await getattr(service, hook)()
            for endpoint in self.node.spec.endpoints.values():
                address = Address(self.context.settings.namespace, self.node.name, endpoint.name)
                handler = _handler(service, endpoint)
                self._served.append(
                    await self._runtime.serve(
                        address, handler, instance=self.context.instance, metadata=self.context.metadata
                    )
                )
        except BaseException:
            await self.stop()
            raise

    async def withdraw(self) -> None:
        """Take no new calls."""
        for served in self._served:
            await served.withdraw()

    async def drain(self) -> None:
        """Take no new calls and finish what runs. Give up with `asyncio.timeout`."""
        await self.withdraw()
        hooks = [getattr(self._service, hook)() for hook in self.node.spec.hooks.get("drain", ())]
        await asyncio.gather(*hooks, *(served.drain() for served in self._served))

    async def stop(self) -> None:
        """End the service. Idempotent; a stop hook that fails is logged and does not keep the others from running."""
        for served in self._served:
            await served.close()
        for hook in reversed(self.node.spec.hooks.get("stop", ()) if self._service is not None else ()):
            try:
                await getattr(self._service, hook)()
            except Exception:
                logger.exception("%s: stop hook %s failed", self.context.instance, hook)
        self._service = None

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)


def _handler(service: Any, endpoint: EndpointSpec) -> Handler:
    method = getattr(service, endpoint.method)
    if endpoint.takes_context:
        return method  # type: ignore[no-any-return]

    def without_context(request: Any, context: RequestContext) -> AsyncIterator[Any]:
        return method(request)  # type: ignore[no-any-return]

    return without_context
