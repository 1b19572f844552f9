"""A small graph whose services have one key of every kind, and ways to configure it."""

from typing import Annotated, Any, ClassVar

import msgspec
import pytest
from msgspec import Meta

from core.graph import Graph, Service, ServiceConfig, depends, load_settings, plan, service
from core.graph.config import Alias, Follows, Needs, Secret


@service(abstract=True)
class Router(Service):
    class Config(ServiceConfig, frozen=True, kw_only=True):
        min_workers: int = 1


@service(abstract=True)
class PrefillWorker(Service):
    class Config(ServiceConfig, frozen=True, kw_only=True):
        FOLLOWS: ClassVar[str] = "Worker"
        model: str = ""
        engine: str = "torch"


@service(workers=3, resources={"gpu": 0}, envs={"A": "1"})
class Worker(Service):
    class Config(ServiceConfig, frozen=True, kw_only=True):
        model: Annotated[str, Follows("Processor")] = ""
        engine: str = "torch"
        block_size: Annotated[int, Meta(ge=1)] | None = None
        share: Annotated[float, Meta(gt=0, le=1)] = 0.9
        eager: bool = False
        names: tuple[str, ...] = ()
        engine_args: dict[str, Any] = msgspec.field(default_factory=dict)

    prefill_worker = depends(PrefillWorker, optional=True)


@service()
class Processor(Service):
    class Config(ServiceConfig, frozen=True, kw_only=True):
        model: Annotated[str, Follows("Worker")] = ""
        router: Annotated[str, Needs("Router", unless=("round-robin",))] = "round-robin"
        key: Annotated[str, Secret()] = ""

    router = depends(Router)
    worker = depends(Worker)


ALIASES = {"VllmWorker": Alias("Worker", {"engine": "vllm"}), "TorchWorker": Alias("Worker", {"engine": "torch"})}


class Configure:
    """Resolves settings of the small graph from YAML text, overrides and the other layers."""

    def __init__(self, folder):
        self.folder = folder
        with Graph.building("small") as graph:
            Processor.link(Worker)
        self.plan = plan(graph)

    def __call__(self, yaml=None, *overrides, environment=None, **shortcuts):
        file = None
        if yaml is not None:
            file = self.folder / "config.yaml"
            file.write_text(yaml)
        return load_settings(
            self.plan,
            file=file,
            overrides=[tuple(o.split("=", 1)) for o in overrides],
            shortcuts=shortcuts,
            aliases=ALIASES,
            environment=environment or {},
        )


@pytest.fixture
def configure(tmp_path):
    return Configure(tmp_path)
