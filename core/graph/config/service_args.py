"""`ServiceArgs`: how a service is run, as opposed to what it does."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica takes of the machine."""

    gpu: Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern=r"^[0-9]+$")] = 0
    """GPUs a replica; a number written as text is a number."""
    cpu: str | int | None = None
    """CPU cores a replica; read by deployment tools, not enforced here."""
    memory: str | None = None
    """Memory a replica ("20Gi"); read by deployment tools, not enforced here."""

    @property
    def gpus(self) -> int:
        """GPUs a replica."""
        return int(self.gpu)


class ServiceArgs(msgspec.Struct, frozen=True, kw_only=True):
    """Every service has these, under the key `ServiceArgs`."""

    workers: Annotated[int, Meta(ge=1)] = 1
    """Replicas of the service."""
    resources: Resources = Resources()
    """What one replica takes of the machine."""
    namespace: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = "dynamo"
    """Names the deployment; the same for all services of a graph."""
    envs: dict[str, str] = {}
    """Environment variables of the service."""
    max_restarts: Annotated[int, Meta(ge=0)] = 5
    """How often in a row a failed replica is brought back before it is given up."""
    python: str | None = None
    """Interpreter that runs the service, for engines whose packages conflict; needs a process of its own."""
    process: Literal["shared", "own"] = "shared"
    """"own" gives every replica a process of its own; "shared" lets services share one where that is useful."""
