"""The disaggregated graph with its prefill queue on a real JetStream server."""

import asyncio

import pytest

from core.prefill.queue import QueueUnavailable
from tests.components.disagg_house import DisaggHouse
from tests.prefill.nats_server import NatsServer

NATS = ("Worker.prefill-queue=nats", "Worker.prefill-ack-wait=1")


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = NatsServer(tmp_path).start()
    monkeypatch.setenv("NATS_SERVER", server.url)
    yield server
    server.kill()


def prompt(number):
    return [20 + number, *range(30, 70)]


async def test_many_requests_on_many_workers(server):
    async with DisaggHouse(*NATS, prefill=2, decode=2) as house:
        said = await asyncio.gather(*(house.text(prompt(i)) for i in range(30)))
        assert said == [await house.expected(prompt(i)) for i in range(30)]
        state = await house.quiet()
        assert sum(worker["ways"]["imported"] for worker in state["workers"]) == 30


async def test_a_prefill_worker_that_is_lost_has_its_task_taken_by_another(server):
    async with DisaggHouse(*NATS, "Worker.prefill-concurrency=1", prefill=2) as house:
        gates = [engine.gates["prefill"] for engine in house.engines[:2]]
        for gate in gates:
            gate.close()
        asking = asyncio.create_task(house.text(prompt(0)))
        await asyncio.wait(
            [asyncio.create_task(gate.arrived.wait()) for gate in gates], return_when=asyncio.FIRST_COMPLETED
        )
        busy = next(engine for engine in house.engines[:2] if engine.calls["prefill"])
        await house.kill("PrefillWorker", int(busy.worker_id.split("-")[1]))
        for gate in gates:
            gate.open.set()
        assert await asking == await house.expected(prompt(0))
        assert (await house.quiet())["workers"][0]["ways"] == {"imported": 1}


async def test_a_server_that_dies_midway_is_no_error_for_anybody(server):
    async with DisaggHouse(*NATS, "Worker.prefill-queue-timeout=3") as house:
        assert await house.text(prompt(0)) == await house.expected(prompt(0))
        server.kill()
        said = await asyncio.gather(*(house.text(prompt(i)) for i in range(1, 5)))
        assert said == [await house.expected(prompt(i)) for i in range(1, 5)]
        state = await house.state()
        assert state["workers"][0]["ways"] == {"imported": 1, "fallback to local": 4}
        assert state["workers"][0]["queue_depth"] is None
        server.start()
        async with asyncio.timeout(30):
            while (await house.state())["workers"][0]["ways"]["imported"] < 2:
                await house.text(prompt(6))
                await asyncio.sleep(0.1)


async def test_a_server_that_is_not_there_is_said_at_the_start(monkeypatch):
    monkeypatch.setenv("NATS_SERVER", "nats://127.0.0.1:1")
    house = DisaggHouse(*NATS)
    with pytest.raises(
        QueueUnavailable, match=r"No NATS server can be reached at nats://127.0.0.1:1 .*nats-server -js"
    ):
        await house.deployment.start()
    assert house.deployment.replicas("PrefillWorker") == []
