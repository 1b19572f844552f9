"""What the router survives: workers that vanish, its own restart, cancellations, garbage, bad prompts."""

import asyncio
import random
from collections import Counter

import pytest
from router_engine import DIE, FULL, CacheEngine
from router_house import (
    WORKER,
    client,
    complete,
    engine,
    generate,
    gone,
    held,
    is_idle,
    prompt,
    router_of,
    selector_of,
    settle,
    state_of,
    until,
)

from core.components.card import WorkerCard
from core.components.router_messages import FeedRequest, subject
from core.graph import State
from core.kv import KvReplayRequest
from core.messages import (
    Capabilities,
    EngineInfo,
    RequestContext,
    RequestRejected,
)
from core.runtime import Address


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
