"""What only the JetStream queue can suffer: a server that is not there, dies, forgets, or is told nonsense."""

from __future__ import annotations

import asyncio
import signal
import sys
import time

import nats
import pytest

from core.prefill.nats_queue import NatsQueue
from core.prefill.queue import QueueSettings, QueueUnavailable, TaskTooLarge
from tests.prefill.house import House, ask
from tests.prefill.nats_server import NatsServer
from tests.prefill.queues import ONE, make_task

FAST = QueueSettings(ack_wait=0.6, retry_delay=0.05)


@pytest.fixture
def server(tmp_path):
    server = NatsServer(tmp_path).start()
    yield server
    server.kill()


async def _ignore(_: Exception) -> None:
    """The client reports every lost connection; these tests lose them on purpose."""


async def connect(server: NatsServer):
    return await nats.connect(server.url, reconnect_time_wait=0.05, max_reconnect_attempts=-1, error_cb=_ignore)


async def opened(server: NatsServer, settings: QueueSettings = FAST, **more: object):
    client = await connect(server)
    queue = NatsQueue(client, "model/x", settings, answer=0.5, **more)
    await queue.open()
    return client, queue


async def test_a_server_without_jetstream_is_a_sentence(tmp_path):
    server = NatsServer(tmp_path, jetstream=False).start()
    try:
        client = await connect(server)
        with pytest.raises(QueueUnavailable, match=r"prefill queue 'model_x_\w+' does not work"):
            await NatsQueue(client, "model/x", answer=0.3).open()
        await client.close()
    finally:
        server.kill()


async def test_a_server_that_dies_midway_is_noticed_at_once_and_loses_nothing(server):
    client, queue = await opened(server)
    taker = queue.taker("p0")
    await queue.submit(make_task("before"))
    server.kill()
    async with asyncio.timeout(5):
        while client.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    began = time.monotonic()
    with pytest.raises(QueueUnavailable, match="there is no connection to NATS"):
        await queue.submit(make_task("meanwhile"))
    with pytest.raises(QueueUnavailable):
        await queue.depth()
    with pytest.raises(QueueUnavailable):
        await taker.take(ONE, 1)
    assert time.monotonic() - began < 1
    await asyncio.to_thread(server.start)
    async with asyncio.timeout(10):
        while not client.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await queue.submit(make_task("after"))
    names = []
    for _ in range(2):
        (taken,) = await taker.take(ONE, 10)
        names.append(taken.task.task_id)
        await taken.ack()
    assert names == ["before", "after"]
    await taker.close()
    await client.close()


async def test_a_server_that_forgot_everything_is_set_up_again(server):
    client, queue = await opened(server)
    taker = queue.taker("p0")
    await queue.submit(make_task("lost"))
    assert await queue.depth() == 1
    context = client.jetstream()
    for stream in await context.streams_info():
        await context.delete_stream(stream.config.name)
    await queue.submit(make_task("a"))
    (taken,) = await taker.take(ONE, 5)
    assert taken.task.task_id == "a"
    await taken.ack()
    for stream in await context.streams_info():
        await context.delete_stream(stream.config.name)
    waiting = asyncio.create_task(taker.take(ONE, 10))
    await asyncio.sleep(0.2)
    await queue.submit(make_task("b"))
    (taken,) = await waiting
    assert taken.task.task_id == "b"
    await taken.ack()
    await taker.close()
    await client.close()


async def test_a_prompt_too_long_for_the_server_is_a_sentence(server):
    client, queue = await opened(server)
    with pytest.raises(TaskTooLarge, match=r"400000 tokens is \d+ bytes.*raise max_payload"):
        await queue.submit(make_task("long", tokens=400_000, prefix=70_000))
    assert await queue.depth() == 0
    await client.close()


async def test_what_is_no_task_is_dropped(server, caplog):
    client, queue = await opened(server)
    taker = queue.taker("p0")
    await client.jetstream().publish(f"{queue._store.name}.task.2", b"nonsense")
    await queue.submit(make_task("a"))
    (taken,) = await taker.take(ONE, 5)
    assert taken.task.task_id == "a"
    await taken.ack()
    assert "is no task and is dropped" in caplog.text
    assert (await client.jetstream().stream_info(queue._store.name)).state.messages == 0
    await taker.close()
    await client.close()


async def test_settings_of_a_queue_that_exists_are_brought_up_to_date(server):
    client, queue = await opened(server, QueueSettings(capacity=1))
    await queue.submit(make_task("a"))
    other, larger = await opened(server, QueueSettings(capacity=2, ack_wait=2.0))
    await larger.submit(make_task("b"))
    assert await larger.depth() == 2
    await client.close()
    await other.close()


async def test_names_that_look_alike_are_different_queues(server):
    client, _ = await opened(server)
    names = {NatsQueue(client, name)._store.name for name in ("a/b", "a_b", "a.b", "a b")}
    assert len(names) == 4
    await client.close()


WORKER = """
import asyncio, sys
import nats
from core.prefill.nats_queue import NatsQueue
from core.prefill.queue import QueueSettings, Room

async def main():
    client = await nats.connect(sys.argv[1])
    taker = NatsQueue(client, "model/x", QueueSettings(ack_wait=0.6, retry_delay=0.05)).taker("victim")
    (taken,) = await taker.take(Room(1, 1000), 10)
    print(taken.task.task_id, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_the_task_of_a_killed_process_is_taken_by_another(server):
    client, queue = await opened(server)
    await queue.submit(make_task("a"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, server.url, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert (await asyncio.wait_for(process.stdout.readline(), 20)).strip() == b"a"
    taker = queue.taker("p1")
    assert await taker.take(ONE, 3 * FAST.ack_wait) == []
    process.send_signal(signal.SIGKILL)
    await process.wait()
    began = time.monotonic()
    (taken,) = await taker.take(ONE, 10)
    assert time.monotonic() - began < 5
    assert (taken.task.task_id, taken.attempt, taken.silent) == ("a", 2, True)
    await taken.ack()
    assert await queue.depth() == 0
    await taker.close()
    await client.close()


async def test_both_sides_on_jetstream_and_a_server_that_dies_under_them(server):
    client, queue = await opened(server)
    async with House(prefill=2, queue=queue) as house:
        requests = [ask(f"r{i}", i + 20, *range(i % 5 + 1)) for i in range(12)]
        said = await asyncio.gather(*(house.say(request) for request in requests))
        for request, (tokens, _) in zip(requests, said, strict=True):
            assert tokens == await house.expected(request)
        assert house.decoders[0].ends == {"imported": 12}
        server.kill()
        async with asyncio.timeout(5):
            while client.is_connected:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        request = ask("while it is down")
        assert (await house.say(request))[0] == await house.expected(request)
        assert house.decoders[0].ends["fallback to local"] == 1
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(10):
            while not client.is_connected:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        request = ask("when it is back")
        assert (await house.say(request))[0] == await house.expected(request)
        assert house.decoders[0].ends["imported"] == 13
    await client.close()
