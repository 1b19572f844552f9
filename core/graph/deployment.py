"""Runs a graph in this process: starts its services in order, replaces replicas that fail, ends them in reverse."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

from core.engine import EngineRegistry
from core.graph.config import Settings
from core.graph.context import Preflight
from core.graph.one_process import OneProcess
from core.graph.plan import Node, Plan
from core.graph.replica import Replica
from core.messages import ConfigError, DynamoError
from core.observe import Metrics
from core.runtime import Runtime

logger = logging.getLogger("dynamo.graph")


class DeploymentFailed(DynamoError):
    """A service has no replica left and could not be brought back."""


class State(StrEnum):
    """What is going on with one replica."""

    STARTING = "starting"
    PROGRESS = "progress"
    READY = "ready"
    FAILED = "failed"
    RESTARTING = "restarting"
    GIVEN_UP = "given up"
    STOPPED = "stopped"


@dataclass(frozen=True)
class ReplicaEvent:
    """Tells whoever watches the deployment what changed."""

    service: str
    replica: int
    state: State
    text: str = ""


@dataclass(frozen=True)
class RestartPolicy:
    """When a failed replica is brought back; how often is `ServiceArgs.max_restarts`."""

    first_delay: float = 1.0
    """Seconds before the first try; each further one waits twice as long, up to `longest_delay`."""
    longest_delay: float = 30.0
    settled: float = 60.0
    """A replica that served this many seconds has all its attempts again."""


class Deployment:
    """The services of one graph in one process. `async with` starts and stops them."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        runtime: Runtime,
        *,
        engines: EngineRegistry | None = None,
        observe: Callable[[ReplicaEvent], None] | None = None,
        restart: RestartPolicy | None = None,
    ) -> None:
        """Nothing is started. `engines` defaults to every installed adapter."""
        self.plan = plan
        self.settings = settings
        self.runtime = runtime
        self.engines = engines or EngineRegistry()
        self.metrics = Metrics()
        self.announcements: list[str] = []
        """What services say to the operator once everything is up."""
        self._observe = observe or _ignore
        self._restart = restart or RestartPolicy()
        self._process = OneProcess(settings)
        self._live: dict[tuple[str, int], Replica] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[None] | None = None

    def preflight(self) -> None:
        """Find what would make the start fail, before anything is loaded. Raises `ConfigError`."""
        self._process.check()
        look = Preflight(self.plan, self.settings, self.engines)
        for node in self.plan.nodes.values():
            check = getattr(node.cls, "preflight", None)
            if check is not None:
                check(self.settings.services[node.name].config, look)

    async def start(self) -> None:
        """Start every service, dependencies first. What was started is stopped again when one of them fails."""
        self.preflight()
        self._failure = asyncio.get_running_loop().create_future()
        self._process.enter()
        try:
            for node in self.plan.nodes.values():
                await self._start_service(node)
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> None:
        """Return never; raises `DeploymentFailed` when a service has no replica left. Cancel it to go on."""
        assert self._failure is not None
        await asyncio.shield(self._failure)

    @property
    def in_flight(self) -> int:
        """Requests that run on the entry service or anywhere below it."""
        return max((replica.in_flight for replica in self._live.values()), default=0)

    def replicas(self, service: str) -> list[Replica]:
        """The replicas of a service that serve now."""
        return [r for (name, _), r in self._live.items() if name == service and not r.failed.done()]

    async def drain(self) -> None:
        """Take no new requests and finish the running ones, the entry service first. Limit it by `asyncio.timeout`."""
        await self._end_keepers()
        for name in reversed(list(self.plan.nodes)):
            await asyncio.gather(*(replica.drain() for replica in self.replicas(name)))

    async def stop(self) -> None:
        """End every service, the entry first. Idempotent."""
        await self._end_keepers()
        for name in reversed(list(self.plan.nodes)):
            replicas = [replica for (service, _), replica in self._live.items() if service == name]
            await asyncio.gather(*(replica.stop() for replica in replicas))
            for replica in replicas:
                del self._live[name, replica.index]
                self._tell(replica.node, replica.index, State.STOPPED)
        self._process.leave()
        if self._failure is not None:
            self._failure.cancel()

    def check_integrity(self) -> None:
        """Raises `AssertionError` if the bookkeeping contradicts itself."""
        for (name, index), replica in self._live.items():
            assert replica.node is self.plan.nodes[name]
            assert replica.index == index
        self.runtime.check_integrity()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _start_service(self, node: Node) -> None:
        # One after the other: libraries that load models in one process are not made for two loads at once.
        for index in range(self.settings.services[node.name].args.workers):
            await self._start_replica(node, index)
            keeper = asyncio.create_task(self._keep(node, index), name=f"keep {node.name}-{index}")
            self._keepers.append(keeper)

    async def _start_replica(self, node: Node, index: int) -> Replica:
        self._tell(node, index, State.STARTING)
        replica = Replica(
            node,
            index,
            self.plan,
            self.settings,
            self.runtime,
            self.engines,
            self.metrics,
            lambda text: self._tell(node, index, State.PROGRESS, text),
            self.announcements.append,
            self._process.gpus(node.name, index),
        )
        try:
            await replica.start()
        except Exception as error:
            error.add_note(f"This happened while {node.name}-{index} was starting.")
            raise
        self._live[node.name, index] = replica
        self._count(node)
        self._tell(node, index, State.READY)
        return replica

    async def _keep(self, node: Node, index: int) -> None:
        """Replace the replica each time it fails, until its attempts are used up."""
        loop = asyncio.get_running_loop()
        attempts = 0
        while True:
            replica = self._live[node.name, index]
            began = loop.time()
            error = await asyncio.shield(replica.failed)
            if loop.time() - began >= self._restart.settled:
                attempts = 0
            logger.error("%s failed: %s", replica.context.instance, error)
            self.metrics.replica_failed(node.name)
            self._count(node)
            self._tell(node, index, State.FAILED, str(error))
            await replica.stop()
            del self._live[node.name, index]
            attempts = await self._bring_back(node, index, attempts)
            if (node.name, index) not in self._live:
                self._give_up(node, index, error)
                return

    async def _bring_back(self, node: Node, index: int, attempts: int) -> int:
        """Try until the replica serves again or no attempt is left. Gives the number of attempts used."""
        policy = self._restart
        most = self.settings.services[node.name].args.max_restarts
        while attempts < most:
            delay = min(policy.first_delay * 2**attempts, policy.longest_delay)
            attempts += 1
            self._tell(node, index, State.RESTARTING, f"in {delay:g} s, attempt {attempts} of {most}")
            await asyncio.sleep(delay)
            try:
                await self._start_replica(node, index)
                return attempts
            except ConfigError as error:
                logger.error("%s-%d cannot be started: %s", node.name, index, error)  # trying again changes nothing
                return most
            except Exception:
                logger.exception("%s-%d could not be restarted", node.name, index)
        return attempts

    def _give_up(self, node: Node, index: int, error: BaseException) -> None:
        self._tell(node, index, State.GIVEN_UP, str(error))
        if self.replicas(node.name) or self._failure is None or self._failure.done():
            return
        if node.spec.dispensable:
            logger.error("%s has no replica left; the deployment goes on without it.", node.name)
        else:
            self._failure.set_exception(DeploymentFailed(f"{node.name} has no replica left: {error}"))

    async def _end_keepers(self) -> None:
        keepers, self._keepers = self._keepers, []
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    def _count(self, node: Node) -> None:
        self.metrics.replicas(node.name, len(self.replicas(node.name)))

    def _tell(self, node: Node, index: int, state: State, text: str = "") -> None:
        self._observe(ReplicaEvent(node.name, index, state, text))


def _ignore(event: ReplicaEvent) -> None:
    """Nobody watches."""
