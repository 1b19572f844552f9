"""The router on real engines: what it believes of their caches is what they reuse."""

import asyncio
import json
import random

import httpx
import pytest
from router_house import client, until

from core.components import engine_aliases
from core.graph import Deployment, RestartPolicy, load_plan, load_settings
from core.runtime import LocalRuntime

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def torch_workers():
    """A deployment of graphs.agg_router on the demo model; one thread an engine."""
    pytest.importorskip("torch")

    def build(*overrides, workers=2):
        plan = load_plan("graphs.agg_router")
        given = [
            ("Worker.ServiceArgs.workers", str(workers)),
            ("Worker.engine-args.threads", "1"),
            ("Frontend.port", "0"),
            *(tuple(o.split("=", 1)) for o in overrides),
        ]
        settings = load_settings(plan, overrides=given, aliases=engine_aliases([]), environment={})
        return Deployment(plan, settings, LocalRuntime(), restart=RestartPolicy(first_delay=0.01))

    return build


def fleet_of(deployment):
    return deployment.replicas("Router")[0]._service._fleet


async def in_step(deployment):
    """Every event that the engines made has reached the index."""
    index, last = fleet_of(deployment).selector.index, -1
    async with asyncio.timeout(10):
        while len(index) != last:
            last = len(index)
            await asyncio.sleep(0.05)


async def ask(http: httpx.AsyncClient, body):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    body = {"model": "demo", "max_tokens": 4, "temperature": 0} | body
    answer = await http.post(path, json=body, headers={"X-Dynamo-Explain": "1"})
    assert answer.status_code == 200, answer.text
    (decision,) = json.loads(answer.headers["x-dynamo-decision"])
    return answer.json(), decision


async def test_conversations_stay_where_they_began_and_are_shared_out(torch_workers, url):
    async with torch_workers() as deployment, client(url(deployment)) as http:
        animals = ("A cat", "Dogs", "The whale", "My swan")
        talks = [[{"role": "user", "content": f"{animal} was here. Tell me its story. " * 6}] for animal in animals]
        began = await asyncio.gather(*(ask(http, {"messages": talk}) for talk in talks))
        homes = [decision["worker"] for _, decision in began]
        for talk, (answer, _) in zip(talks, began, strict=True):
            talk.append(answer["choices"][0]["message"])
        assert len(set(homes)) == 2
        await in_step(deployment)
        for turn in range(3):
            for talk, home in zip(talks, homes, strict=True):
                talk.append({"role": "user", "content": f"And what happened then, in part {turn}?"})
                answer, decision = await ask(http, {"messages": talk})
                assert (decision["worker"], decision["reason"]) == (home, "hit")
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32
                talk.append(answer["choices"][0]["message"])
                await in_step(deployment)
        fleet_of(deployment).check_integrity()


async def test_what_the_router_expects_is_what_the_engine_reuses(torch_workers, url):
    """In a pool so small that the engines evict all the time."""
    async with torch_workers("Worker.num-kv-blocks=40") as deployment, client(url(deployment)) as http:
        rng = random.Random(1)
        stems = [rng.choices(range(100, 3000), k=160) for _ in range(6)]
        wrong = computed = 0
        for _ in range(60):
            stem = rng.choice(stems)
            prompt = stem[: rng.choice((48, 96, 160))] + rng.choices(range(100, 3000), k=rng.randrange(1, 60))
            answer, decision = await ask(http, {"prompt": prompt})
            expected = min(int(decision["hit_tokens"]), (len(prompt) - 1) // 16 * 16)
            wrong += answer["usage"]["prompt_tokens_details"]["cached_tokens"] != expected
            computed += len(prompt) // 16 - expected // 16
            await in_step(deployment)
        assert wrong == 0
        held = len(fleet_of(deployment).selector.index)
        assert held <= 2 * 40 < computed, "the pool was large enough for everything, so nothing was tested"
        fleet_of(deployment).check_integrity()
        assert fleet_of(deployment).selector.follower.counters.gaps == 0


async def test_a_worker_lost_in_the_middle_is_forgotten_and_comes_back_empty(torch_workers, url):
    async with torch_workers() as deployment, client(url(deployment)) as http:
        prompt = list(range(100, 300))
        _, first = await ask(http, {"prompt": prompt})
        await in_step(deployment)
        (replica,) = [r for r in deployment.replicas("Worker") if r.context.instance == first["worker"]]
        asked = [asyncio.create_task(ask(http, {"prompt": [*prompt, n], "max_tokens": 60})) for n in range(500, 506)]
        await until(lambda: fleet_of(deployment).selector.loads.in_flight == 6)
        replica.context.fail(RuntimeError("the test pulled the plug"))
        await asyncio.gather(*asked, return_exceptions=True)
        _, second = await ask(http, {"prompt": prompt})
        assert second["worker"] != first["worker"]
        await until(lambda: len(deployment.replicas("Worker")) == 2, 60)
        await until(lambda: len(fleet_of(deployment).selector.targets) == 2)
        state = fleet_of(deployment).selector.state()
        assert first["worker"] not in {worker.worker for worker in state.workers}
        assert fleet_of(deployment).selector.loads.in_flight == 0
        fleet_of(deployment).check_integrity()
