"""What the tests of the router share."""

import asyncio
import json
import random

import httpx
import msgspec
from router_engine import CacheEngine

from core.components.router_messages import RoutersState
from core.messages import EngineRequest, RequestContext, StopConditions
from core.runtime import Address

ROUTER = Address("dynamo", "Router", "generate")
WORKER = Address("dynamo", "Worker", "generate")


def client(url):
    return httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None), timeout=60)


async def until(condition, seconds=10):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.005)


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


def held(deployment, worker):
    selector = selector_of(deployment)
    return sum(selector.index.blocks_of(target) for target in selector.targets if target.worker == worker)


def gone(deployment):
    """Ids of workers that the Router sent something to and that are not running any more."""
    decided = {decision.target.worker for decision in selector_of(deployment).recent}
    live = {instance.id for instance in deployment.runtime.client(WORKER).instances()}
    return decided - live
