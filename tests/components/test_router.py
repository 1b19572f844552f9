"""Where the router sends requests: conversations, bursts, hot prefixes, policies, sessions, ranks, its queue."""

import asyncio
from collections import Counter

import pytest
from router_engine import CacheEngine
from router_house import client, complete, generate, held, is_idle, prompt, selector_of, settle, state_of, until


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
