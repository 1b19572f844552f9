"""Routers among workers and each other: who publishes what, who knows what, when requests are taken."""

import asyncio

import msgspec
from router_engine import CacheEngine
from router_house import ROUTER, WORKER, engine, is_idle, prompt, router_of, selector_of, settle, until

from core.components.card import WorkerCard
from core.components.kv_publisher import KvPublisher
from core.components.router_fleet import Fleet
from core.components.router_messages import FeedRequest, LoadReport, subject
from core.engine import EngineHost
from core.kv import KvReplayRequest
from core.messages import (
    Capabilities,
    EngineConfig,
    EngineInfo,
    EngineRequest,
    RequestContext,
    Role,
    StopConditions,
)
from core.routing import RouterConfig
from core.runtime import Address, LocalRuntime


async def unreachable(request, context):
    raise AssertionError("nothing may be sent here")
    yield


class TestSeveralRouters:
    async def test_each_knows_what_the_others_have_in_flight(self, serve):
        overrides = ("Router.ServiceArgs.workers=2", "Worker.engine-args.gated=true", "Worker.max-num-seqs=64")
        async with serve(*overrides, workers=2, graph="graphs.agg_router:Processor") as deployment:
            one, other = (replica.context.instance for replica in deployment.replicas("Router"))
            await until(lambda: all(router_of(deployment, n)._fleet.state().peers == 1 for n in (0, 1)))
            service = deployment.runtime.client(ROUTER)

            async def ask(router, number):
                request = EngineRequest(
                    request_id=f"{router}-{number}", token_ids=prompt(number), stop=StopConditions(max_tokens=1)
                )
                async for _ in service.stream(request, RequestContext(request_id=request.request_id), router):
                    pass

            asked = [asyncio.create_task(ask(one, n)) for n in range(10)]
            loads = selector_of(deployment, 1).loads
            await until(lambda: sum(loads.load(t).requests for t in loads.targets) == 10)
            assert loads.in_flight == 0
            CacheEngine.gate.set()
            await asyncio.gather(*asked)
            await until(lambda: sum(loads.load(t).requests for t in loads.targets) == 0)
            await until(lambda: is_idle(deployment))
            await settle(deployment)
            deployment.replicas("Router")[1].context.fail(RuntimeError("the test ends it"))
            await until(lambda: router_of(deployment)._fleet.state().peers == 0)
            assert other not in {i.id for i in service.instances()}


class TestPublishing:
    async def test_nobody_publishes_in_a_graph_without_a_router(self, serve):
        async with serve(graph="graphs.agg:Processor") as deployment:
            everything = await deployment.runtime.subscribe("dynamo.>")
            service = deployment.runtime.client(WORKER)
            for number in range(6):
                request = EngineRequest(
                    request_id=f"r{number}", token_ids=prompt(number), stop=StopConditions(max_tokens=2)
                )
                async for _ in service.stream(request, RequestContext(request_id=request.request_id)):
                    pass
            await everything.close()
            assert [message async for message in everything] == []
            assert not any(one.listeners for one in CacheEngine.running.values())

    async def test_load_alone_is_published_for_policies_that_look_at_no_cache(self, serve):
        async with serve("Router.router=least-loaded", graph="graphs.agg_router:Processor") as deployment:
            heard = set()
            async with asyncio.timeout(5):
                async for _, payload in await deployment.runtime.subscribe(subject("dynamo", "kv_load")):
                    heard.add(msgspec.msgpack.decode(payload, type=LoadReport).worker)
                    if len(heard) == 3:
                        break
            assert heard == set(CacheEngine.running)
            assert not any(one.listeners for one in CacheEngine.running.values())

    async def test_a_worker_stops_when_no_router_listens_any_more(self, registry):
        config = EngineConfig(model="", worker_id="w")
        async with (
            EngineHost(registry.get("cache"), config, Role.AGGREGATED) as host,
            LocalRuntime() as runtime,
        ):
            now = [0.0]
            publisher = KvPublisher(host, "w", runtime, "dynamo", clock=lambda: now[0])
            cache = engine("w")
            assert not publisher.active
            publisher.answer(FeedRequest(events=True))
            await until(lambda: publisher.active and cache.listeners == 1)
            publisher.check_integrity()
            now[0] = 1000.0
            await until(lambda: not publisher.active and cache.listeners == 0)
            publisher.check_integrity()
            assert publisher.answer(FeedRequest(events=True, replay=KvReplayRequest(worker="w"))) != []
            await until(lambda: cache.listeners == 1)
            await publisher.close()
            assert cache.listeners == 0
            assert publisher.answer(FeedRequest(events=True)) == []
            publisher.check_integrity()


class TestStart:
    async def test_requests_are_taken_when_enough_workers_are_there(self, registry):
        info = EngineInfo(vocab_size=8192, max_model_len=4096, eos_token_ids=(), block_size=16, num_kv_blocks=10)
        card = WorkerCard(info=info, capabilities=Capabilities(), served_name="demo", tokenizer="")
        said = []
        async with LocalRuntime() as runtime:
            fleet = Fleet(
                RouterConfig(router="least-loaded"),
                runtime,
                "dynamo",
                "Router-0",
                workers=runtime.client(WORKER),
                feed=runtime.client(Address("dynamo", "Worker", "feed")),
                peers=runtime.client(ROUTER),
                fail=said.append,
            )
            starting = asyncio.create_task(fleet.start(2, said.append))
            await runtime.serve(WORKER, unreachable, instance="w0", metadata=card.encode())
            await until(lambda: said)
            assert said == ["waiting for 2 workers, 0 are live"] or said == ["waiting for 2 workers, 1 are live"]
            assert not starting.done()
            await runtime.serve(WORKER, unreachable, instance="w1", metadata=card.encode())
            assert (await starting).served_name == "demo"
            assert {target.worker for target in fleet.selector.targets} == {"w0", "w1"}
            fleet.check_integrity()
            await fleet.close()
            await fleet.close()
            assert len(said) == 1
