"""The aggregated graph on the puppet engine, in this process."""

import sys
from pathlib import Path

import httpx
import pytest

from core.components import engine_aliases
from core.engine import EngineRegistry, Source
from core.graph import Deployment, RestartPolicy, load_plan, load_settings
from core.runtime import LocalRuntime

sys.path.insert(0, str(Path(__file__).parent / "plugin"))

from puppet_engine import AbsentEngine, PuppetEngine
from router_engine import CacheEngine


@pytest.fixture
def registry():
    engines = EngineRegistry(entry_points=[])
    engines.add(PuppetEngine, Source("puppet", "puppet-engine"))
    engines.add(AbsentEngine, Source("absent", "puppet-engine"))
    engines.add(CacheEngine, Source("cache", "router-engine"))
    CacheEngine.begin()
    return engines


@pytest.fixture
def make(registry):
    """Builds a deployment of graphs.agg from overrides, on a free port; events collect in its `seen`."""

    def build(*overrides, restart=None, graph="graphs.agg"):
        plan = load_plan(graph)
        given = [("Worker.ServiceArgs.max-restarts", "3"), *(tuple(o.split("=", 1)) for o in overrides)]
        if "Frontend" in plan.nodes and not any(path == "Frontend.port" for path, _ in given):
            given.append(("Frontend.port", "0"))
        settings = load_settings(
            plan, overrides=given, shortcuts={"engine": "puppet"}, aliases=engine_aliases([]), environment={}
        )
        seen = []
        deployment = Deployment(
            plan,
            settings,
            LocalRuntime(),
            engines=registry,
            observe=seen.append,
            restart=restart or RestartPolicy(first_delay=0.01),
        )
        deployment.seen = seen
        return deployment

    return build


@pytest.fixture
def serve(make):
    """Builds a deployment of graphs.agg_router on the cache engine; keys of all services come as overrides."""

    def build(*overrides, workers=3, graph="graphs.agg_router", **options):
        given = ("Worker.engine=cache", f"Worker.ServiceArgs.workers={workers}", *overrides)
        chosen = {override.partition("=")[0]: override for override in given}
        return make(*chosen.values(), graph=graph, **options)

    return build


@pytest.fixture
def calls():
    """Ids of the workers that generate something from now on."""
    PuppetEngine.calls.clear()
    return PuppetEngine.calls


@pytest.fixture
def url():
    """Where a deployment's Frontend listens."""

    def find(deployment):
        (text,) = deployment.announcements
        return text.split(" at ")[1].split("/v1")[0]

    return find


@pytest.fixture
def client(url):
    """An HTTP client of a deployment."""
    return lambda deployment: httpx.AsyncClient(base_url=url(deployment))
