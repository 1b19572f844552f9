"""The disaggregated graphs over HTTP: the answers of an aggregated worker, whoever fails, and nothing left behind."""

import asyncio
import json
import random

import httpx
import pytest

from core.messages import EngineError, Rendezvous
from tests.components.disagg_house import DisaggHouse

KINDS = list(Rendezvous)
GRAPHS = [("graphs.disagg",), ("graphs.disagg_router", "Router.router=least-loaded")]


def prompt(number=0, length=33):
    return [20 + number % 400, *(30 + (number + i) % 450 for i in range(length - 1))]


@pytest.fixture(params=KINDS, ids=map(str, KINDS))
def kind(request):
    return request.param


@pytest.mark.parametrize("graph", GRAPHS, ids=["disagg", "disagg_router"])
async def test_answers_are_those_of_an_aggregated_worker(kind, graph):
    async with DisaggHouse(*graph[1:], kind=kind, graph=graph[0]) as house:
        for length in (1, 3, 4, 5, 64):
            assert await house.text(prompt(length, length)) == await house.expected(prompt(length, length))
        state = await house.quiet()
        assert state["workers"][0]["ways"] == {"imported": 5}
        assert state["workers"][0]["decisions"] == {"always": 5}
        assert state["workers"][0]["imported_tokens"] == 77


async def test_three_prefill_workers_serve_two_workers(kind):
    async with DisaggHouse(kind=kind, prefill=3, decode=2) as house:
        prompts = [prompt(i, 5 + i) for i in range(40)]
        said = await asyncio.gather(*map(house.text, prompts))
        assert said == [await house.expected(one) for one in prompts]
        state = await house.quiet()
        assert sum(worker["ways"]["imported"] for worker in state["workers"]) == 40
        assert all(worker["ways"]["imported"] == 20 for worker in state["workers"])
        assert all(engine.calls["prefill"] for engine in house.engines[:3])


async def test_several_choices_of_a_prompt(kind):
    async with DisaggHouse(kind=kind) as house:
        answer = (await house.complete(prompt(), n=3, temperature=0)).json()
        assert {choice["text"] for choice in answer["choices"]} == {await house.expected(prompt())}
        assert len(answer["choices"]) == 3


async def test_a_stream_has_one_end(kind):
    async with DisaggHouse(kind=kind) as house:
        body = {"model": "demo", "prompt": prompt(), "max_tokens": 6, "stream": True}
        async with house.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
        assert lines[-1] == "[DONE]"
        choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
        assert "".join(choice["text"] for choice in choices) == await house.expected(prompt())
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]


async def test_the_two_sides_find_each_other_whatever_clients_call_the_model():
    async with DisaggHouse("Worker.served-model-name=something", "Frontend.served-model-name=demo") as house:
        assert await house.text(prompt()) == await house.expected(prompt())
        assert (await house.quiet())["workers"][0]["ways"] == {"imported": 1}


async def test_what_runs_is_finished_when_the_deployment_drains(kind):
    async with DisaggHouse("Worker.prefill-concurrency=1", kind=kind) as house:
        gate = house.engine("PrefillWorker").gates["prefill"]
        gate.close()
        expected = [await house.expected(prompt(i)) for i in range(3)]
        asking = [asyncio.create_task(house.text(prompt(i))) for i in range(3)]
        await gate.arrived.wait()
        await house.queued(2)
        draining = asyncio.create_task(house.deployment.drain())
        await house.until(lambda: house.instances("Frontend", "x") == [] and not draining.done())
        gate.open.set()
        assert await asyncio.gather(*asking) == expected
        async with asyncio.timeout(10):
            await draining
        house.drained = True


class TestDecision:
    async def test_short_prompts_stay_and_every_decision_is_explained(self):
        rules = ("Worker.conditional-disagg=true", "Worker.max-local-prefill-length=10")
        async with DisaggHouse(*rules) as house:
            found = []
            for length in (10, 11):
                answer = await house.complete(prompt(0, length), headers={"X-Dynamo-Explain": "1"})
                (decision,) = json.loads(answer.headers["x-dynamo-decision"])
                found.append(decision["prefill"])
            local, remote = found
            assert (local["decision"]["code"], remote["decision"]["code"]) == ("short", "long")
            assert local["decision"]["reason"] == (
                "Local: 10 uncached tokens are not more than max-local-prefill-length, 10."
            )
            assert local["story"] is None
            assert remote["story"]["way"] == "imported"
            assert remote["story"]["worker"].startswith("PrefillWorker-0-")
            assert remote["story"]["attempts"] == 1
            assert all(remote["story"][step] >= 0 for step in ("queued", "prefill", "transfer"))
            state = await house.quiet()
            assert state["workers"][0]["decisions"] == {"short": 1, "long": 1}

    async def test_a_router_passes_the_workers_decision_on(self):
        async with DisaggHouse("Router.router=least-loaded", graph="graphs.disagg_router") as house:
            answer = await house.complete(prompt(), headers={"X-Dynamo-Explain": "1"})
            (decision,) = json.loads(answer.headers["x-dynamo-decision"])
            assert decision["worker"] == decision["prefill"]["worker"]
            assert decision["prefill"]["decision"]["remote"] is True

    async def test_nothing_is_sent_to_a_queue_that_is_long_enough(self):
        rules = ("conditional-disagg=true", "max-local-prefill-length=2", "max-prefill-queue-size=1")
        async with DisaggHouse(*(f"Worker.{r}" for r in rules), "Worker.prefill-concurrency=1") as house:
            gate = house.engine("PrefillWorker").gates["prefill"]
            gate.close()
            running = asyncio.create_task(house.text(prompt(1)))
            await gate.arrived.wait()
            waiting = asyncio.create_task(house.text(prompt(2)))
            await house.queued(1)
            assert await house.text(prompt(3)) == await house.expected(prompt(3))
            assert (await house.state())["workers"][0]["decisions"] == {"long": 2, "queue long": 1}
            gate.open.set()
            assert await running == await house.expected(prompt(1))
            assert await waiting == await house.expected(prompt(2))

    async def test_settings_change_while_serving(self):
        async with DisaggHouse(decode=2) as house:
            change = {"conditional_disagg": True, "max-local-prefill-length": 50}
            answer = await house.http.post("/prefill/settings", json=change)
            assert answer.json()["settings"]["max-local-prefill-length"] == 50
            assert answer.json()["configured"]["max-local-prefill-length"] == 1000
            for number in range(2):
                await house.text(prompt(number, 50))
            state = await house.state()
            assert [worker["decisions"] for worker in state["workers"]] == [{"short": 1}] * 2
            await house.http.post("/prefill/settings", json={"conditional-disagg": None})
            await house.text(prompt(2, 50))
            assert {"short": 1, "always": 1} in [w["decisions"] for w in (await house.state())["workers"]]
            await house.http.post("/prefill/settings", json={"remote-prefill": False})
            for number in range(2):
                await house.text(prompt(number, 50))
            assert all(w["decisions"]["off"] == 1 for w in (await house.state())["workers"])

    async def test_a_worker_that_comes_later_serves_by_the_changed_settings(self):
        async with DisaggHouse() as house:
            await house.http.post("/prefill/settings", json={"remote-prefill": False})
            await house.kill("Worker")
            await house.until(lambda: len(house.engines) == 3 and house.deployment.replicas("Worker"))
            await house.text(prompt())
            assert (await house.state())["workers"][0]["decisions"] == {"off": 1}

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"max-local-prefill-length": -1}, "max-local-prefill-length is -1; it must be at least 0."),
            ({"max-local-prefill-length": "x"}, "Expected `int`, got `str`"),
            ({"kv-lease": 3}, "'kv-lease' cannot be changed while serving; what can is enable-disagg"),
            ([1], "must be an object, found a list"),
        ],
    )
    async def test_a_change_that_cannot_be_is_refused_in_a_sentence(self, change, sentence):
        async with DisaggHouse() as house:
            before = (await house.http.get("/prefill/settings")).json()
            answer = await house.http.post("/prefill/settings", json=change)
            assert answer.status_code == 400
            assert sentence in answer.json()["error"]["message"]
            assert (await house.http.get("/prefill/settings")).json() == before


class TestPrefillWorkerLost:
    """The client hears nothing of it."""

    POINTS = (("PrefillWorker", "prefill"), ("PrefillWorker", "export"), ("Worker", "import"), ("Worker", "decode"))

    @pytest.mark.parametrize("others", [0, 1], ids=["alone", "with another"])
    @pytest.mark.parametrize(("service", "point"), POINTS, ids=[f"{s}-{p}" for s, p in POINTS])
    async def test_before_during_and_after_the_transfer(self, kind, service, point, others):
        async with DisaggHouse(kind=kind, prefill=1 + others) as house:
            gates = [
                e.gates[point] for e in house.engines if (e.worker_id.startswith("Prefill")) == (service != "Worker")
            ]
            for gate in gates:
                gate.close()
            asking = asyncio.create_task(house.text(prompt()))
            await asyncio.wait(
                [asyncio.create_task(gate.arrived.wait()) for gate in gates], return_when=asyncio.FIRST_COMPLETED
            )
            lost = next(e for e in house.engines if e.calls["prefill"])
            index = int(lost.worker_id.split("-")[1])
            await house.kill("PrefillWorker", index)
            for gate in gates:
                gate.open.set()
            assert await asking == await house.expected(prompt())
            await house.until(lambda: len(house.deployment.replicas("PrefillWorker")) == 1 + others)
            assert await house.text(prompt(7)) == await house.expected(prompt(7))

    async def test_while_the_task_waits_in_the_queue(self):
        async with DisaggHouse("Worker.prefill-concurrency=1") as house:
            gate = house.engine("PrefillWorker").gates["prefill"]
            gate.close()
            asking = [asyncio.create_task(house.text(prompt(i))) for i in range(3)]
            await gate.arrived.wait()
            await house.kill("PrefillWorker")
            assert await asyncio.gather(*asking) == [await house.expected(prompt(i)) for i in range(3)]

    async def test_without_any_every_prompt_is_prefilled_by_the_worker_at_once(self):
        async with DisaggHouse(prefill=2, decode=2) as house:
            for replica in house.deployment.replicas("PrefillWorker"):
                await replica.withdraw()
            assert await house.text(prompt()) == await house.expected(prompt())
            state = await house.state()
            assert state["workers"][0]["decisions"] == {"no worker": 1}
            assert state["workers"][0]["prefill_workers"] == 0

    async def test_one_that_drains_finishes_what_it_has_and_takes_nothing_more(self):
        async with DisaggHouse("Worker.prefill-concurrency=1", prefill=2) as house:
            gates = [engine.gates["prefill"] for engine in house.engines[:2]]
            for gate in gates:
                gate.close()
            asking = [asyncio.create_task(house.text(prompt(i))) for i in range(2)]
            for gate in gates:
                await gate.arrived.wait()
            draining = asyncio.create_task(house.replica("PrefillWorker", 0).drain())
            await house.until(lambda: house.engines[0].worker_id not in house.instances("PrefillWorker", "state"))
            assert not draining.done()
            for gate in gates:
                gate.open.set()
            assert await asyncio.gather(*asking) == [await house.expected(prompt(i)) for i in range(2)]
            await draining
            calls = house.engines[0].calls["prefill"]
            assert await house.text(prompt(5)) == await house.expected(prompt(5))
            assert house.engines[0].calls["prefill"] == calls


class TestWorkerLost:
    POINTS = (("PrefillWorker", "prefill"), ("PrefillWorker", "export"), ("Worker", "reserve"), ("Worker", "import"))

    @pytest.mark.parametrize(("service", "point"), POINTS, ids=[f"{s}-{p}" for s, p in POINTS])
    async def test_another_worker_answers_and_the_first_ones_prefill_is_let_go(self, kind, service, point):
        async with DisaggHouse(kind=kind, decode=2) as house:
            engines = [e for e in house.engines if e.worker_id.startswith(f"{service}-")]
            for engine in engines:
                engine.gates[point].close()
            asking = asyncio.create_task(house.text(prompt()))
            await asyncio.wait(
                [asyncio.create_task(e.gates[point].arrived.wait()) for e in engines],
                return_when=asyncio.FIRST_COMPLETED,
            )
            asked = next(e for e in house.engines if e.worker_id.startswith("Worker-") and e.calls["reserve"])
            await house.kill("Worker", int(asked.worker_id.split("-")[1]))
            for engine in engines:
                engine.gates[point].open.set()
            assert await asking == await house.expected(prompt())

    async def test_alone_the_client_has_one_error_that_says_to_try_again(self):
        async with DisaggHouse() as house:
            gate = house.engine("PrefillWorker").gates["prefill"]
            gate.close()
            asking = asyncio.create_task(house.complete(prompt()))
            await gate.arrived.wait()
            await house.kill("Worker")
            answer = await asking
            assert answer.status_code == 503
            assert "was stopped" in answer.json()["error"]["message"]
            gate.open.set()
            await house.until(lambda: len(house.engines) == 3 and house.deployment.replicas("Worker"))
            assert await house.text(prompt()) == await house.expected(prompt())


class TestFailures:
    async def test_a_full_queue_is_no_error(self, kind):
        full = ("Worker.prefill-queue-capacity=1", "Worker.prefill-concurrency=1")
        async with DisaggHouse(*full, kind=kind) as house:
            gate = house.engine("PrefillWorker").gates["prefill"]
            gate.close()
            first = asyncio.create_task(house.text(prompt(0)))
            await gate.arrived.wait()
            assert await house.text(prompt(1)) == await house.expected(prompt(1))
            gate.open.set()
            assert await first == await house.expected(prompt(0))
            worker = (await house.quiet())["workers"][0]
            assert worker["given_up"] == {"queued: submit failed": 1}
            assert worker["ways"] == {"imported": 1, "fallback to local": 1}
            metrics = (await house.http.get("/metrics")).text
            assert 'dynamo_prefill_fallbacks_total{reason="queued: submit failed"' in metrics

    @pytest.mark.parametrize("policy", ["error", "local"])
    async def test_a_poisoned_prompt_is_a_dead_letter(self, kind, policy):
        async with DisaggHouse(f"Worker.poisoned-prefill={policy}", kind=kind, prefill=2) as house:
            for engine in house.engines[:2]:
                engine.gates["prefill"].fail(*[EngineError("this prompt is evil")] * 3)
            answer = await house.complete(prompt())
            state = await house.quiet()
            assert state["workers"][0]["queue"]["dead"] == 1
            assert sum(engine.calls["prefill"] for engine in house.engines[:2]) == 3
            if policy == "local":
                assert answer.json()["choices"][0]["text"] == await house.expected(prompt())
            else:
                assert answer.status_code == 500
                assert "this prompt is evil" in answer.json()["error"]["message"]
                assert house.engines[2].calls["decode"] == 0

    @pytest.mark.parametrize("fallback", ["local", "error"])
    @pytest.mark.parametrize(
        ("service", "point", "key", "where"),
        [
            ("Worker", "reserve", "reserve-timeout", "reserving: timeout"),
            ("PrefillWorker", "prefill", "prefill-timeout", "prefilling: timeout"),
            ("Worker", "import", "kv-transfer-timeout", "importing: timeout"),
        ],
    )
    async def test_every_wait_has_its_deadline(self, service, point, key, where, fallback):
        async with DisaggHouse(f"Worker.{key}=0.1", f"Worker.prefill-fallback={fallback}") as house:
            gate = house.engine(service).gates[point]
            gate.close()
            answer = await house.complete(prompt())
            gate.open.set()
            if fallback == "local":
                assert answer.json()["choices"][0]["text"] == await house.expected(prompt())
            else:
                assert answer.status_code == 500
                assert "Waited 0.1 s for" in answer.json()["error"]["message"]
            assert (await house.quiet())["workers"][0]["given_up"] == {where: 1}

    async def test_a_task_that_nobody_takes_is_prefilled_by_the_worker(self):
        async with DisaggHouse("Worker.prefill-queue-timeout=0.1", "Worker.prefill-concurrency=1") as house:
            gate = house.engine("PrefillWorker").gates["prefill"]
            gate.close()
            first = asyncio.create_task(house.text(prompt(0)))
            await gate.arrived.wait()
            assert await house.text(prompt(1)) == await house.expected(prompt(1))
            gate.open.set()
            await first
            assert (await house.quiet())["workers"][0]["given_up"] == {"queued: timeout": 1}

    async def test_a_request_at_fault_is_the_clients_error(self, kind):
        async with DisaggHouse(kind=kind) as house:
            answer = await house.complete([13, 2, 3])
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "prompt"

    async def test_a_server_that_is_asked_for_what_the_graph_has_not(self):
        async with DisaggHouse(graph="graphs.disagg:Frontend") as house:
            assert (await house.http.get("/routing/state")).status_code == 404


class TestClientLeaves:
    POINTS = (
        ("Worker", "reserve"),
        ("PrefillWorker", "prefill"),
        ("PrefillWorker", "export"),
        ("Worker", "import"),
        ("Worker", "decode"),
    )

    @pytest.mark.parametrize(("service", "point"), POINTS, ids=[f"{s}-{p}" for s, p in POINTS])
    async def test_at_every_stage_everything_is_free_within_a_second(self, kind, service, point):
        async with DisaggHouse(kind=kind) as house:
            gate = house.engine(service).gates[point]
            gate.close()
            body = {"model": "demo", "prompt": prompt(), "max_tokens": 50, "stream": True}
            async with httpx.AsyncClient(base_url=house.url) as http:
                asking = asyncio.create_task(http.post("/v1/completions", json=body))
                await gate.arrived.wait()
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            if point in ("reserve", "export", "import"):  # an engine's call that does not end by itself
                await house.until(lambda: house.deployment.in_flight == 0, seconds=1)
                gate.open.set()
            await house.quiet(seconds=1)

    async def test_while_the_task_waits_it_leaves_the_queue(self):
        async with DisaggHouse("Worker.prefill-concurrency=1") as house:
            gate = house.engine("PrefillWorker").gates["prefill"]
            gate.close()
            first = asyncio.create_task(house.text(prompt(0)))
            await gate.arrived.wait()
            async with httpx.AsyncClient(base_url=house.url) as http:
                body = {"model": "demo", "prompt": prompt(1), "max_tokens": 5}
                asking = asyncio.create_task(http.post("/v1/completions", json=body))
                await house.queued(1)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            await house.queued(0, seconds=1)
            gate.open.set()
            assert await first == await house.expected(prompt(0))
            assert (await house.quiet())["workers"][0]["queue"]["cancelled"] == 1


async def test_a_storm_of_cancellations_leaves_nothing_behind(kind):
    chance = random.Random(5)
    async with DisaggHouse(kind=kind, prefill=2, decode=2, blocks=400) as house:

        async def one(number):
            text = prompt(number, chance.randint(1, 60))
            try:
                async with asyncio.timeout(chance.choice([None, None, None, 0.05, 0.2, 0.5, 1.0])):
                    answer = await house.complete(text, max_tokens=8)
            except TimeoutError:
                return "left"
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == await house.expected(text, max_tokens=8)
                return "answered"
            assert answer.json()["error"]["code"] == "overloaded"  # these engines have no queue of their own
            return "refused"

        answers = await asyncio.gather(*(one(number) for number in range(240)))
        assert answers.count("answered") >= 40
        state = await house.quiet()
        assert sum(worker["rooms"]["opened"] for worker in state["workers"]) > 100
        assert sum(worker["ways"].get("aborted", 0) for worker in state["workers"]) > 0
