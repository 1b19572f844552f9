"""The aggregated graph in one process: answers, balance, death of an engine, draining."""

import asyncio
import os
from itertools import pairwise

import httpx
import pytest

from core.components.card import WorkerCard
from core.graph import DeploymentFailed, State
from core.messages import ConfigError, EngineDead, EngineRequest, RequestContext, StopConditions
from core.runtime import Address

GENERATE = Address("dynamo", "Worker", "generate")
DIE = 13


def states(deployment, service):
    return [(e.replica, e.state) for e in deployment.seen if e.service == service and e.state is not State.PROGRESS]


async def until(condition, seconds=5):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.005)


async def generate(deployment, *tokens, count=3):
    request = EngineRequest(request_id="r", token_ids=list(tokens), stop=StopConditions(max_tokens=count))
    stream = deployment.runtime.client(GENERATE).stream(request, RequestContext(request_id="r"))
    return [token async for delta in stream for token in delta.token_ids]


async def test_a_chat_streams_over_http(make, client):
    async with make() as deployment, client(deployment) as http:
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 4}
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert answer.status_code == 200
        assert lines[-1] == "data: [DONE]"
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == "demo"
        tokens = (await http.post("/v1/tokenize", json={"model": "demo", "prompt": "hello"})).json()["tokens"]
        text = (await http.post("/v1/detokenize", json={"model": "demo", "tokens": tokens})).json()
        assert "hello" in text.values()
        deployment.check_integrity()


async def test_the_served_name_of_the_frontend_is_the_models_name(make, client):
    async with make("Frontend.served_model_name=my-model") as deployment, client(deployment) as http:
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == "my-model"
        body = {"model": "demo", "prompt": "x", "max_tokens": 1}
        assert (await http.post("/v1/completions", json=body)).status_code == 404


async def test_a_prompt_longer_than_the_model_is_refused_in_a_sentence(make, client):
    async with make("Worker.max-model-len=16") as deployment, client(deployment) as http:
        answer = await http.post("/v1/completions", json={"model": "demo", "prompt": "word " * 50, "max_tokens": 1})
        assert answer.status_code == 400
        assert "16" in answer.json()["error"]["message"]


async def test_workers_take_turns(make, client, calls):
    async with make("Worker.ServiceArgs.workers=3") as deployment, client(deployment) as http:
        body = {"model": "demo", "prompt": "x", "max_tokens": 1}
        for _ in range(6):
            assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert [worker.rsplit("-", 1)[0] for worker in calls] == ["Worker-0", "Worker-1", "Worker-2"] * 2
    assert len(set(calls)) == 3


async def test_workers_are_chosen_at_random_when_asked(make, client, calls):
    async with (
        make("Worker.ServiceArgs.workers=2", "Processor.router=random") as deployment,
        client(deployment) as http,
    ):
        body = {"model": "demo", "prompt": "x", "max_tokens": 1}
        for _ in range(40):
            assert (await http.post("/v1/completions", json=body)).status_code == 200
    turns = [a != b for a, b in pairwise(calls)]
    assert len(set(calls)) == 2
    assert not all(turns)


async def test_a_dead_engine_is_replaced_and_meanwhile_the_other_worker_serves(make):
    async with make("Worker.ServiceArgs.workers=2", graph="graphs.agg:Worker") as deployment:
        before = {i.id for i in deployment.runtime.client(GENERATE).instances()}
        with pytest.raises(EngineDead, match="strings were cut"):
            await generate(deployment, DIE)
        assert await generate(deployment, 5, 6) == [5, 6, 5]
        await until(lambda: len(deployment.replicas("Worker")) == 2)
        after = {i.id for i in deployment.runtime.client(GENERATE).instances()}
        assert len(before & after) == 1
        found = [state for _, state in states(deployment, "Worker")]
        assert found == [State.STARTING, State.READY] * 2 + [
            State.FAILED, State.RESTARTING, State.STARTING, State.READY,
        ]  # fmt: skip
        figures = deployment.metrics.render().decode().splitlines()
        assert 'dynamo_replicas{service="Worker"} 2.0' in figures
        assert 'dynamo_replica_failures_total{service="Worker"} 1.0' in figures
        deployment.check_integrity()


async def test_a_death_that_no_request_notices_is_found_by_the_health_check(make):
    async with make("Worker.health-interval=0.01", graph="graphs.agg:Worker") as deployment:
        (replica,) = deployment.replicas("Worker")
        stream = deployment.runtime.client(GENERATE).stream(
            EngineRequest(request_id="r", token_ids=[DIE], stop=StopConditions(max_tokens=9)),
            RequestContext(request_id="r"),
        )
        await anext(stream)
        await stream.aclose()
        await until(lambda: deployment.replicas("Worker") not in ([], [replica]))


async def test_a_worker_that_cannot_come_back_fails_the_deployment(make, client, tmp_path):
    overrides = (f"Worker.engine-args.starts={tmp_path / 'starts'}", "Worker.engine-args.max_starts=1")
    async with make(*overrides) as deployment, client(deployment) as http:
        with pytest.raises(EngineDead):
            await generate(deployment, DIE)
        with pytest.raises(DeploymentFailed, match="Worker has no replica left: the puppet's strings were cut"):
            async with asyncio.timeout(5):
                await deployment.wait()
        assert (0, State.GIVEN_UP) in states(deployment, "Worker")
        assert len((tmp_path / "starts").read_text()) == 1 + 3
        assert (await http.get("/health")).status_code == 503
        body = {"model": "demo", "prompt": "x", "max_tokens": 1}
        assert (await http.post("/v1/completions", json=body)).status_code == 503


async def test_one_worker_given_up_does_not_end_the_others(make, tmp_path):
    overrides = (f"Worker.engine-args.starts={tmp_path / 'starts'}", "Worker.engine-args.max_starts=2")
    async with make(*overrides, "Worker.ServiceArgs.workers=2", graph="graphs.agg:Worker") as deployment:
        with pytest.raises(EngineDead):
            await generate(deployment, DIE)
        await until(lambda: any(state is State.GIVEN_UP for _, state in states(deployment, "Worker")))
        assert len(deployment.replicas("Worker")) == 1
        assert await generate(deployment, 7, count=1) == [7]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await deployment.wait()


async def test_draining_finishes_running_streams_and_takes_no_new_ones(make, client):
    deployment = make("Worker.engine-args.step=0.02")
    async with deployment, client(deployment) as http:
        body = {"model": "demo", "prompt": "x", "max_tokens": 20, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            assert deployment.in_flight == 1
            draining = asyncio.create_task(deployment.drain())
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        async with asyncio.timeout(2):
            await draining
        assert deployment.in_flight == 0
        with pytest.raises(httpx.ConnectError):
            await http.get("/health")


async def test_a_client_that_leaves_frees_the_engine_within_a_second(make, client):
    async with make("Worker.engine-args.step=0.01") as deployment, client(deployment) as http:
        body = {"model": "demo", "prompt": "x", "max_tokens": 4000, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            await anext(answer.aiter_lines())
            assert "dynamo_engine_running" in deployment.metrics.render().decode()
        await until(lambda: deployment.in_flight == 0, seconds=1)


async def test_two_deployments_live_in_one_process(make, client, url):
    async with make("Frontend.served_model_name=one") as one, make("Frontend.served_model_name=two") as two:
        assert url(one) != url(two)
        for deployment, name in ((one, "one"), (two, "two")):
            async with client(deployment) as http:
                assert (await http.get("/v1/models")).json()["data"][0]["id"] == name


class TestRefusedBeforeAnythingIsLoaded:
    @pytest.mark.parametrize(
        ("overrides", "complaint"),
        [
            (["Worker.engine=pupet"], "Unknown engine 'pupet'; did you mean puppet"),
            (["Worker.engine=absent"], "'absent' cannot run here: .*no-such-package.* pip install absent"),
            (["Worker.model=./nowhere"], r"Model folder .*/nowhere does not exist"),
            (["Worker.model=no such thing"], "neither a folder here nor a hub id"),
            (["Worker.tensor-parallel-size=2", "Worker.engine=puppet"], "does not support 'tensor-parallel-size'"),
            (["Frontend.ServiceArgs.workers=2"], "one process listens on a port once"),
            (["Frontend.endpoint=dynamo.Router.chat"], "write dynamo.Processor.chat/completions"),
            (["Frontend.host=no.such.host.invalid"], "is not known"),
            (["Frontend.ssl-certfile=missing.pem"], r"TLS file 'missing\.pem' does not exist"),
            (["Processor.model=a/b", "Worker.model=c/d"], "Processor.model is 'a/b' and Worker.model is 'c/d'"),
            (["Worker.ServiceArgs.python=/usr/bin/python3"], "needs a process of its own"),
            (["Worker.ServiceArgs.process=own"], "needs a process of its own"),
            (["Worker.ServiceArgs.envs.X=1", "Frontend.ServiceArgs.envs.X=2"], "share one process; give both the same"),
        ],
    )
    async def test_in_a_sentence(self, make, overrides, complaint):
        deployment = make(*overrides)
        with pytest.raises(ConfigError, match=complaint) as caught:
            await deployment.start()
        assert "\n" not in str(caught.value)
        assert deployment.seen == []

    async def test_a_port_that_is_taken(self, make):
        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            with pytest.raises(ConfigError, match=f"Port {port} on 127.0.0.1 is taken.*--Frontend.port"):
                await make(f"Frontend.port={port}").start()

    async def test_gpus_that_are_not_there(self, make, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with pytest.raises(ConfigError, match="asks for 1 GPU for each of 3 replicas, and this machine has 2"):
            await make("Worker.ServiceArgs.resources.gpu=1", "Worker.ServiceArgs.workers=3").start()


async def test_gpus_are_disjoint_and_reach_the_engine(make, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    overrides = ("Worker.ServiceArgs.resources.gpu=1", "Worker.ServiceArgs.workers=2")
    async with make(*overrides, graph="graphs.agg:Worker") as deployment:
        assert [replica.context.gpus for replica in deployment.replicas("Worker")] == [(0,), (1,)]
        cards = [WorkerCard.decode(i.metadata) for i in deployment.runtime.client(GENERATE).instances()]
        assert [card.info.device for card in cards] == ["cuda:0", "cuda:1"]


async def test_environment_variables_are_set_while_serving(make, monkeypatch):
    monkeypatch.delenv("PUPPET", raising=False)
    async with make("Worker.ServiceArgs.envs.PUPPET=7", graph="graphs.agg:Worker"):
        assert os.environ["PUPPET"] == "7"
    assert "PUPPET" not in os.environ


async def test_an_engine_that_refuses_to_start_stops_everything(make):
    deployment = make("Worker.engine-args.refuse=No memory for the KV cache; lower num-kv-blocks.")
    with pytest.raises(ConfigError, match="lower num-kv-blocks"):
        await deployment.start()
    assert deployment.runtime.client(GENERATE).instances() == []
    deployment.check_integrity()
