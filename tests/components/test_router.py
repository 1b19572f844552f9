"""The router over HTTP and through its endpoints: conversations, bursts, losses, restarts, what can be seen of it."""

import asyncio
import json
import random
from collections import Counter

import msgspec
import pytest
from router_engine import DIE, FULL, CacheEngine
from router_house import client, until

from core.components.card import WorkerCard
from core.components.kv_publisher import KvPublisher
from core.components.router_fleet import Fleet
from core.components.router_messages import FeedRequest, LoadReport, RoutersState, subject
from core.engine import EngineHost
from core.graph import State
from core.kv import KvReplayRequest
from core.messages import (
    Capabilities,
    EngineConfig,
    EngineInfo,
    EngineRequest,
    RequestContext,
    RequestRejected,
    Role,
    StopConditions,
)
from core.routing import RouterConfig
from core.runtime import Address, LocalRuntime

ROUTER = Address("dynamo", "Router", "generate")
WORKER = Address("dynamo", "Worker", "generate")


def prompt(seed, tokens=64):
    return random.Random(seed).choices(range(100, 8000), k=tokens)


def router_of(deployment, number=0):
    return deployment.replicas("Router")[number]._service


def selector_of(deployment, number=0):
    return router_of(deployment, number)._fleet.selector


def engine(worker):
    return CacheEngine.running[worker]


async def generate(deployment, tokens, count=2, name="r", **context):
    request = EngineRequest(request_id=name, token_ids=list(tokens), stop=StopConditions(max_tokens=count))
    stream = deployment.runtime.client(ROUTER).stream(request, RequestContext(request_id=name, **context))
    return [delta async for delta in stream]


async def complete(http, tokens, **body):
    """A completion over HTTP: the answer, and the decision that it was made by."""
    body = {"model": "demo", "prompt": list(tokens), "max_tokens": 2} | body
    headers = {"X-Dynamo-Explain": "1"} | body.pop("headers", {})
    answer = await http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    (decision,) = json.loads(answer.headers["x-dynamo-decision"])
    return answer.json(), decision


async def state_of(http):
    return msgspec.json.decode((await http.get("/routing/state")).content, type=RoutersState).routers


def routers(deployment):
    return [replica._service for replica in deployment.replicas("Router")]


async def settle(deployment):
    """Nothing is in flight, now; the workers' reports agree soon; and all that is known adds up."""
    for router in routers(deployment):
        assert router._fleet.selector.loads.in_flight == 0
        router.check_integrity()
    await until(lambda: is_idle(deployment))
    for router in routers(deployment):
        router.check_integrity()


def is_idle(deployment):
    loads = [router._fleet.selector.loads for router in routers(deployment)]
    return all(load.in_flight == 0 for load in loads) and all(
        load.load(target).requests == 0 for load in loads for target in load.targets
    )


class TestWhereRequestsGo:
    async def test_a_conversation_returns_to_the_worker_that_has_it(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            tokens = prompt(1, 100)
            _, first = await complete(http, tokens)
            assert first["reason"] == "cold"
            for turn in range(2, 6):
                await until(lambda blocks=len(tokens) // 16: held(deployment, first["worker"]) == blocks)  # noqa: B008
                tokens = [*tokens, *prompt(turn, 40)]
                answer, decision = await complete(http, tokens)
                assert (decision["worker"], decision["reason"]) == (first["worker"], "hit")
                reused = (len(tokens) - 40) // 16 * 16
                assert decision["hit_tokens"] == reused
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == reused
            (state,) = await state_of(http)
            assert state.routing.decisions == {"cold": 1, "hit": 4}
            await settle(deployment)

    async def test_a_burst_of_equal_cold_prompts_is_spread(self, serve, url):
        async with (
            serve("Worker.engine-args.prefill=0.001", workers=4) as deployment,
            client(url(deployment)) as http,
        ):
            tokens = prompt(1, 256)
            answers = await asyncio.gather(*(complete(http, tokens) for _ in range(200)))
            share = Counter(decision["worker"] for _, decision in answers)
            assert len(share) == 4
            assert max(share.values()) <= 80, share
            await until(lambda: is_idle(deployment))
            await settle(deployment)

    async def test_a_hot_prefix_spreads_when_its_holder_is_busy(self, serve, url):
        overrides = ("Worker.engine-args.gated=true", "Worker.max-num-seqs=64")
        async with serve(*overrides) as deployment, client(url(deployment)) as http:
            hot = prompt(1, 320)
            CacheEngine.gate.set()
            _, first = await complete(http, hot)
            await until(lambda: held(deployment, first["worker"]) == 20)
            CacheEngine.gate.clear()
            asked = [asyncio.create_task(complete(http, [*hot, *prompt(n, 64)])) for n in range(60)]
            await until(lambda: selector_of(deployment).loads.in_flight == 60)
            CacheEngine.gate.set()
            decisions = [decision for _, decision in await asyncio.gather(*asked)]
            share = Counter(decision["worker"] for decision in decisions)
            assert decisions[0]["worker"] == first["worker"]
            assert len(share) == 3
            assert "load" in {decision["reason"] for decision in decisions}
            assert max(share.values()) < 50, share

    @pytest.mark.parametrize("policy", ["round-robin", "random", "least-loaded", "power-of-two", "kv", "kv-load"])
    async def test_every_policy_can_be_chosen(self, serve, policy):
        async with serve(f"Processor.router={policy}", graph="graphs.agg_router:Processor") as deployment:
            for number in range(9):
                assert len(await generate(deployment, prompt(number))) == 2
            selector = selector_of(deployment)
            assert selector.policy.name == {"kv-load": "least-loaded"}.get(policy, policy)
            await settle(deployment)
            if policy == "round-robin":
                assert {len(one.requests) for one in CacheEngine.running.values()} == {3}

    async def test_without_events_the_router_remembers_what_it_routed(self, serve):
        async with serve("Router.router-events=false", graph="graphs.agg_router:Processor") as deployment:
            for _ in range(4):
                await generate(deployment, prompt(1))
            (used,) = [one for one in CacheEngine.running.values() if one.requests]
            assert len(used.requests) == 4
            assert not any(one.listeners for one in CacheEngine.running.values())

    @pytest.mark.parametrize(
        "whose",
        [
            {"headers": {"X-Session-Id": "s"}},
            {"user": "s"},
            {"prompt_cache_key": "s"},
            {"headers": {"X-Session-Id": "s"}, "user": "somebody else"},
            {"user": "s" * 500},
        ],
    )
    async def test_a_session_stays_with_its_worker(self, serve, url, whose):
        overrides = ("Router.session-affinity=true", "Router.router=round-robin")
        async with serve(*overrides) as deployment, client(url(deployment)) as http:
            _, first = await complete(http, prompt(0), **whose)
            for number in range(1, 5):
                _, decision = await complete(http, prompt(number), **whose)
                assert (decision["worker"], decision["reason"]) == (first["worker"], "session")
            _, other = await complete(http, prompt(9), user="another")
            assert other["reason"] == "turn"

    async def test_the_data_parallel_rank_is_passed_on(self, serve):
        overrides = ("Worker.data-parallel-size=2",)
        async with serve(*overrides, workers=1, graph="graphs.agg_router:Processor") as deployment:
            (worker,) = CacheEngine.running.values()
            for number in range(8):
                await generate(deployment, prompt(number))
            assert {request.data_parallel_rank for request in worker.requests} == {0, 1}
            warm = worker.requests[0]
            await until(lambda: selector_of(deployment).state().indexed_blocks == 8 * 4)
            worker.requests.clear()
            await generate(deployment, warm.token_ids)
            assert worker.requests[0].data_parallel_rank == warm.data_parallel_rank


def held(deployment, worker):
    selector = selector_of(deployment)
    return sum(selector.index.blocks_of(target) for target in selector.targets if target.worker == worker)


def gone(deployment):
    """Ids of workers that the Router sent something to and that are not running any more."""
    decided = {decision.target.worker for decision in selector_of(deployment).recent}
    live = {instance.id for instance in deployment.runtime.client(WORKER).instances()}
    return decided - live


class TestWhenWorkersGo:
    async def test_one_that_vanishes_between_choice_and_dispatch_is_replaced(self, serve):
        async with serve(graph="graphs.agg_router:Processor") as deployment:
            await generate(deployment, prompt(1))
            (holder,) = [worker for worker, one in CacheEngine.running.items() if one.requests]
            await until(lambda: held(deployment, holder) == 4)
            (replica,) = [r for r in deployment.replicas("Worker") if r.context.instance == holder]
            await replica.withdraw()
            # Nothing has run since, so the Router still believes that the holder is there.
            assert held(deployment, holder) == 4
            deltas = await generate(deployment, prompt(1))
            assert len(deltas) == 2
            router = router_of(deployment)
            assert (router._fleet.counters.rerouted, router._fleet.counters.lost) == (1, 1)
            assert holder not in {target.worker for target in selector_of(deployment).targets}
            await settle(deployment)

    async def test_without_another_worker_the_client_is_told_to_come_back(self, serve, url):
        async with serve(workers=1) as deployment, client(url(deployment)) as http:
            (replica,) = deployment.replicas("Worker")
            await replica.withdraw()
            answer = await http.post("/v1/completions", json={"model": "demo", "prompt": [5], "max_tokens": 1})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "No worker is live" in answer.json()["error"]["message"]
            assert (await http.get("/health")).status_code == 503
            await settle(deployment)

    async def test_one_without_room_hands_on_to_the_next_best_once(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            CacheEngine.full |= {"Worker-0", "Worker-1"}
            served = failed = 0
            for number in range(12):
                body = {"model": "demo", "prompt": [FULL, *prompt(number)], "max_tokens": 1}
                answer = await http.post("/v1/completions", json=body)
                assert answer.status_code in (200, 429)
                served, failed = served + (answer.status_code == 200), failed + (answer.status_code == 429)
            assert served
            assert served + failed == 12
            await settle(deployment)

    async def test_a_dead_one_is_forgotten_at_once_and_its_successor_is_used(self, serve, url):
        async with serve(workers=2) as deployment, client(url(deployment)) as http:
            body = {"model": "demo", "prompt": [DIE, *prompt(1, 63)], "max_tokens": 5}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 503
            (dead,) = gone(deployment)
            assert dead not in {target.worker for target in selector_of(deployment).targets}
            for number in range(6):
                await complete(http, prompt(number))
            await until(lambda: len({t.worker for t in selector_of(deployment).targets}) == 2)
            (state,) = await state_of(http)
            assert dead not in {worker.worker for worker in state.routing.workers}
            assert all(worker.events_synced for worker in state.routing.workers)
            await settle(deployment)

    async def test_one_that_is_stopped_in_the_middle_of_traffic_costs_only_what_it_had_begun(self, serve, url):
        overrides = ("Worker.engine-args.step=0.002",)
        async with serve(*overrides) as deployment, client(url(deployment)) as http:
            bodies = [{"model": "demo", "prompt": prompt(n), "max_tokens": 40} for n in range(30)]
            asked = [asyncio.create_task(http.post("/v1/completions", json=body)) for body in bodies]
            await until(lambda: selector_of(deployment).loads.in_flight == 30)
            replica = deployment.replicas("Worker")[0]
            begun = len(engine(replica.context.instance).open)
            replica.context.fail(RuntimeError("the test pulled the plug"))
            codes = Counter(answer.status_code for answer in await asyncio.gather(*asked))
            assert codes[503] == begun
            assert codes[200] == 30 - begun
            for number in range(6):
                await complete(http, prompt(100 + number))
            await until(lambda: len(deployment.replicas("Worker")) == 3)
            await until(lambda: len(selector_of(deployment).targets) == 3)
            await settle(deployment)


async def test_a_restarted_router_learns_again_from_the_workers(serve, url):
    async with serve() as deployment, client(url(deployment)) as http:
        homes = {n: (await complete(http, prompt(n)))[1]["worker"] for n in range(6)}
        await until(lambda: selector_of(deployment).state().indexed_blocks == 24)
        old = deployment.replicas("Router")[0]
        old.context.fail(RuntimeError("the test restarts it"))
        await until(lambda: old not in deployment.replicas("Router") and deployment.replicas("Router"))
        assert router_of(deployment) is not old._service
        await until(lambda: selector_of(deployment).state().indexed_blocks == 24)
        for number, worker in homes.items():
            _, decision = await complete(http, [*prompt(number), *prompt(99, 20)])
            assert (decision["worker"], decision["reason"]) == (worker, "hit")
        assert [s for e in deployment.seen if e.service == "Router" for s in [e.state]].count(State.READY) == 2
        await settle(deployment)


class TestQueue:
    OVERRIDES = (
        "Worker.engine-args.gated=true",
        "Worker.max-num-seqs=1",
        "Router.router-queue-threshold=1.0",
        "Router.router-queue-limit=2",
    )

    async def test_requests_wait_while_all_are_saturated_and_more_are_refused(self, serve, url):
        async with serve(*self.OVERRIDES, workers=2) as deployment, client(url(deployment)) as http:
            asked = [asyncio.create_task(complete(http, prompt(n))) for n in range(4)]
            await until(lambda: len(selector_of(deployment).queue) == 2)
            refused = await http.post("/v1/completions", json={"model": "demo", "prompt": prompt(9)})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert "router-queue-limit" in refused.json()["error"]["message"]
            assert (await state_of(http))[0].routing.queued == 2
            CacheEngine.gate.set()
            assert len(await asyncio.gather(*asked)) == 4
            await settle(deployment)

    async def test_a_client_that_leaves_the_queue_frees_its_place(self, serve, url):
        async with serve(*self.OVERRIDES, workers=1) as deployment, client(url(deployment)) as http:
            running = asyncio.create_task(complete(http, prompt(0)))
            await until(lambda: selector_of(deployment).loads.in_flight == 1)
            leaving = asyncio.create_task(complete(http, prompt(1)))
            await until(lambda: len(selector_of(deployment).queue) == 1)
            leaving.cancel()
            await until(lambda: len(selector_of(deployment).queue) == 0)
            CacheEngine.gate.set()
            await running
            await until(lambda: is_idle(deployment))
            await settle(deployment)

    async def test_the_more_urgent_goes_first_when_asked(self, serve, url):
        overrides = (*self.OVERRIDES, "Router.router-queue-order=priority")
        async with serve(*overrides, workers=1) as deployment, client(url(deployment)) as http:
            asked = []
            for number, priority in enumerate((0, 1, 5)):
                asked.append(asyncio.create_task(complete(http, [200 + number] * 32, priority=priority)))
                await until(lambda n=number: len(selector_of(deployment).queue) == n)
            CacheEngine.gate.set()
            await asyncio.gather(*asked)
            (worker,) = CacheEngine.running.values()
            assert [request.token_ids[0] for request in worker.requests] == [200, 202, 201]


class TestHarm:
    async def test_a_storm_of_cancellations_leaves_nothing_in_flight(self, serve):
        overrides = ("Worker.engine-args.step=0.001", "Worker.engine-args.prefill=0.00005")
        async with serve(*overrides, graph="graphs.agg_router:Processor") as deployment:
            rng = random.Random(1)
            asked = [asyncio.create_task(generate(deployment, prompt(n), 50, f"r{n}")) for n in range(150)]
            for task in rng.sample(asked, 120):
                await asyncio.sleep(rng.choice((0, 0, 0.0005)))
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: is_idle(deployment), 5)
            await settle(deployment)
            assert all(not one.open for one in CacheEngine.running.values())

    async def test_clients_that_hang_up_leave_nothing_in_flight(self, serve, url):
        overrides = ("Worker.engine-args.step=0.005",)
        async with serve(*overrides) as deployment, client(url(deployment)) as http:

            async def hang_up(number):
                body = {"model": "demo", "prompt": prompt(number), "max_tokens": 500, "stream": True}
                async with http.stream("POST", "/v1/completions", json=body) as answer:
                    lines = answer.aiter_lines()
                    for _ in range(number % 3):
                        await anext(lines)

            await asyncio.gather(*(hang_up(n) for n in range(24)))
            await until(lambda: is_idle(deployment), 5)
            await settle(deployment)
            assert all(not one.open for one in CacheEngine.running.values())

    async def test_garbage_on_the_bus_does_no_harm(self, serve, url):
        async with serve() as deployment, client(url(deployment)) as http:
            _, first = await complete(http, prompt(1))
            await until(lambda: held(deployment, first["worker"]) == 4)
            fleet, runtime = router_of(deployment)._fleet, deployment.runtime
            answers = runtime.client(Address("dynamo", "Worker", "feed")).stream(
                FeedRequest(events=True, replay=KvReplayRequest(worker=first["worker"])),
                RequestContext(request_id="feed"),
                first["worker"],
            )
            (genuine,) = [message async for message in answers]
            rng = random.Random(1)
            sent = 0
            for kind in ("kv_events", "kv_load", "router_inflight"):
                place = subject("dynamo", kind, "x")
                pieces = [genuine[: rng.randrange(len(genuine))] for _ in range(20)]
                pieces += [rng.randbytes(rng.randrange(200)) for _ in range(20)]
                pieces += [genuine, b"", genuine.replace(first["worker"].encode(), b"Worker-9-xxxxxx")]
                for piece in pieces:
                    await runtime.publish(place, piece)
                sent += len(pieces)
            events = selector_of(deployment).follower.counters
            await until(lambda: fleet.counters.unreadable >= 2 * 40 and events.undecodable >= 40)
            assert events.unknown == 1
            assert events.undecodable + fleet.counters.unreadable + events.unknown >= sent - 5
            _, again = await complete(http, prompt(1))
            assert (again["worker"], again["reason"]) == (first["worker"], "hit")
            await settle(deployment)

    @pytest.mark.parametrize("token", [8192, 2**31 - 1])
    async def test_token_ids_outside_the_vocabulary_are_refused(self, serve, url, token):
        async with serve() as deployment, client(url(deployment)) as http:
            body = {"model": "demo", "prompt": [*prompt(1), token], "max_tokens": 1}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 400
            assert str(token) in answer.json()["error"]["message"]
            await settle(deployment)

    @pytest.mark.parametrize("token", [-1, 2**40])
    async def test_what_is_no_token_id_at_all_is_refused_by_the_router(self, serve, token):
        async with serve(graph="graphs.agg_router:Processor") as deployment:
            with pytest.raises(RequestRejected, match="Token 64 of the prompt"):
                await generate(deployment, [*prompt(1), token, *prompt(2, 15)])
            await settle(deployment)

    async def test_a_worker_with_another_block_size_gets_nothing(self, serve, url):
        async with serve(workers=1) as deployment, client(url(deployment)) as http:
            info = EngineInfo(vocab_size=8192, max_model_len=4096, eos_token_ids=(), block_size=64, num_kv_blocks=10)
            card = WorkerCard(info=info, capabilities=Capabilities(kv_events=True), served_name="demo", tokenizer="")
            odd = await deployment.runtime.serve(WORKER, unreachable, instance="odd", metadata=card.encode())
            strange = await deployment.runtime.serve(WORKER, unreachable, instance="strange", metadata=b"\xc1")
            fleet = router_of(deployment)._fleet
            await until(lambda: len(fleet.refused) == 2)
            for number in range(4):
                await complete(http, prompt(number))
            (state,) = await state_of(http)
            assert "its KV blocks have 64 tokens and theirs have 16" in state.refused["odd"]
            assert "cannot be read" in state.refused["strange"]
            assert len(state.routing.workers) == 1
            await odd.close()
            await strange.close()
            await until(lambda: not fleet.refused)
            fleet.check_integrity()


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
