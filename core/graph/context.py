"""What a running service knows of the deployment around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core.engine import EngineRegistry
from core.graph.client import ServiceClient
from core.graph.config import ServiceArgs, Settings
from core.graph.plan import Plan
from core.observe import Metrics
from core.runtime import Runtime


@dataclass
class ServiceContext:
    """One replica's place in its deployment."""

    service: str
    replica: int
    """Counts from 0 within the service."""
    instance: str
    """Unique in the namespace, also after a restart of the replica."""
    args: ServiceArgs
    plan: Plan
    settings: Settings
    runtime: Runtime
    engines: EngineRegistry
    clients: Mapping[str, ServiceClient | None]
    """By attribute name; None for a pruned edge."""
    report: Callable[[str], None]
    """Tell the operator what is going on: "loading the model"."""
    fail: Callable[[BaseException], None]
    """Say that this replica cannot serve any more. It is taken out at once, and replaced."""
    announce: Callable[[str], None]
    """Tell the operator how to use what is served, once everything is up."""
    metrics: Metrics
    """The figures of this process."""
    gpus: tuple[int, ...] = ()
    """Device indices that belong to this replica; empty when it asked for none."""
    metadata: bytes = field(default=b"")
    """Published with every endpoint once the start hooks have run."""

    def dependency(self, attribute: str) -> ServiceClient | None:
        """The client behind a `depends()` attribute."""
        return self.clients[attribute]


@dataclass(frozen=True)
class Preflight:
    """What a service can look at before anything is started."""

    plan: Plan
    settings: Settings
    engines: EngineRegistry
