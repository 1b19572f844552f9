"""Keys of the Router: what is refused before anything starts, with the place where it stands."""

import re

import pytest

from core.components.router import Router
from core.components.router_config import RouterConfig
from core.field_docs import field_docs
from core.graph import Preflight, SettingError, load_plan, load_settings
from core.graph.config.schema import keys_of
from core.messages import ConfigError
from core.resources import shipped
from core.routing import RouterConfig as RoutingConfig

GRAPH = "graphs.agg_router:Router"


def test_every_key_of_routing_is_a_key_of_the_router_and_explained():
    keys = keys_of(RouterConfig)
    assert {name.replace("_", "-") for name in RoutingConfig.__struct_fields__} <= set(keys)
    docs = field_docs(RouterConfig)
    assert all(docs.get(key.attribute) for key in keys.values())


def test_the_policies_read_what_was_configured():
    settings = load_settings(
        load_plan(GRAPH),
        overrides=[
            ("Router.router", "kv-load"),
            ("Router.host-hit-weight", "0.5"),
            ("Router.router-queue-order", "priority"),
        ],
        environment={},
    )
    routing = settings.services["Router"].config.routing()
    assert type(routing) is RoutingConfig
    assert (routing.router, routing.host_hit_weight, routing.router_queue_order) == ("least-loaded", 0.5, "priority")


def test_the_router_takes_what_the_processor_was_given():
    plan = load_plan("graphs.agg_router")
    settings = load_settings(
        plan,
        overrides=[("Processor.router", "random"), ("Processor.kv-hit-weight", "2"), ("Processor.load-weight", "0.1")],
        environment={},
    )
    config = settings.services["Router"].config
    assert (config.router, config.kv_hit_weight, config.load_weight) == ("random", 2.0, 0.1)


def test_the_shipped_configuration_fits_the_shipped_graph():
    settings = load_settings(load_plan("graphs.agg_router"), file=shipped("configs/agg_router.yaml"), environment={})
    assert {name: service.config.router for name, service in settings.services.items() if name != "Frontend"} == {
        "Worker": "kv", "Router": "kv", "Processor": "kv",
    }  # fmt: skip
    assert settings.unused_common == ()


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("Router.router=kvv", "--Router.router: Router.router: unknown routing policy 'kvv'; did you mean kv"),
        ("Processor.router=least_loaded", "did you mean least-loaded"),
        ("Processor.router=zzzzzz", "known are kv, kv-load, least-loaded, power-of-two, random, round-robin"),
        ("Router.router-queue-order=lifo", "must be one of fcfs, priority, found \"lifo\""),
        ("Router.kv-hit-weight=heavy", "must be a number, found"),
        ("Router.kv-hit-weight=NaN", "must be a number, found"),
        ("Router.router-events=perhaps", "must be true or false"),
        ("Router.kv-hit-wieght=1", "did you mean kv-hit-weight"),
        ("Router.min-workers=0", "of at least 1"),
    ],
)  # fmt: skip
def test_what_no_key_can_be_is_refused_with_its_place(override, complaint):
    path, _, value = override.partition("=")
    with pytest.raises(SettingError) as caught:
        load_settings(load_plan("graphs.agg_router"), overrides=[(path, value)], environment={})
    assert complaint in str(caught.value)
    assert f"--{path}: " in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["Router.kv-hit-weight=-1"], "--Router.kv-hit-weight: Router.kv-hit-weight is -1.0; expected a number of 0"),
        (["Router.host-hit-weight=1.5"], "Router.host-hit-weight is 1.5; expected a number from 0 to 1"),
        (["Router.disk-hit-weight=-0.1"], "Router.disk-hit-weight is -0.1"),
        (["Router.router-ttl=-1"], "Router.router-ttl is -1.0"),
        (["Router.router-queue-threshold=0"], "Router.router-queue-threshold is 0, which holds every request for ever"),
        (["Router.router-queue-threshold=-1"], "Router.router-queue-threshold is -1.0"),
        (["Router.router-queue-limit=0"], "Router.router-queue-limit is 0; expected 1 or more"),
        (["Router.router-max-blocks=0"], "Router.router-max-blocks is 0; expected 1 or more"),
        (["Router.kv-hit-weight=0", "Router.load-weight=0"], "are both 0, so every worker scores the same"),
        (["Router.min-workers=4"], "--Router.min-workers: Router.min-workers is 4, and the graph starts 3"),
        (["Worker.enable-prefix-caching=false"], "Worker.enable-prefix-caching is false, and the policy 'kv' routes"),
        (["Worker.block-size=32", "Router.block-size=16"], "Router.block-size is 16 and Worker.block-size is 32"),
        (["Router.router=kv", "Processor.router=random"], "Router.router is 'kv' and Processor.router is 'random'"),
        (["Worker.engine=puppet"], "engine 'puppet' has none; choose --Router.router=least-loaded"),
    ],
)
async def test_what_makes_no_sense_is_refused_before_anything_is_loaded(serve, overrides, complaint):
    deployment = serve(*overrides, graph="graphs.agg_router:Processor")
    with pytest.raises(ConfigError) as caught:
        await deployment.start()
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert deployment.seen == []


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", ["kv-hit-weight", "load-weight", "host-hit-weight", "router-ttl", "session-ttl"])
def test_what_is_no_number_is_refused_in_a_file_too(registry, tmp_path, key, number):
    file = tmp_path / "router.yaml"
    file.write_text(f"Router:\n  {key}: {number}\nWorker:\n  engine: cache\n")
    plan = load_plan(GRAPH)

    def look():
        settings = load_settings(plan, file=file, environment={})
        Router.preflight(settings.services["Router"].config, Preflight(plan, settings, registry))

    with pytest.raises(SettingError, match=rf"{re.escape(str(file))}:2: .*{key}"):
        look()


async def test_policies_that_look_at_no_cache_serve_engines_without_one(serve):
    overrides = ("Worker.engine=puppet", "Router.router=least-loaded")
    async with serve(*overrides, graph=GRAPH) as deployment:
        deployment.check_integrity()
        assert len(deployment.replicas("Router")) == 1


async def test_the_policy_of_a_graph_without_a_router_is_checked_too(make):
    with pytest.raises(SettingError, match=r"'least-loaded', which needs a Router, and graphs\.agg has only"):
        make("Processor.router=least-loaded")
    with pytest.raises(SettingError, match=r"policy 'ronud-robin'; did you mean round-robin\?"):
        make("Processor.router=ronud-robin")


async def test_workers_of_different_block_sizes_are_refused_at_the_start(serve):
    deployment = serve('Worker.engine-args.blocks={"Worker-1": 64}', "Router.min-workers=2", workers=2, graph=GRAPH)
    with pytest.raises(ConfigError, match=r"its KV blocks have 64 tokens and theirs have 16.*the same block-size\."):
        await deployment.start()
