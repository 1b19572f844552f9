"""What every runtime promises. Each implementation runs the same tests."""

import asyncio
from contextlib import aclosing

import pytest

from core.messages import EngineDraining, RequestContext, RequestRejected
from core.runtime import Address, Balance, InstanceGone, LocalRuntime, NoInstance

WORK = Address("tests", "Worker", "generate")
CONTEXT = RequestContext(request_id="r")


@pytest.fixture(params=[LocalRuntime])
async def runtime(request):
    async with request.param() as runtime:
        yield runtime
        runtime.check_integrity()


def says(name, count=1):
    """A handler that gives (name, request) `count` times."""

    async def handler(request, context):
        for _ in range(count):
            yield name, request

    return handler


async def collect(client, request=None, instance=None):
    return [item async for item in client.stream(request, CONTEXT, instance)]


async def within(seconds, awaitable):
    async with asyncio.timeout(seconds):
        return await awaitable


class TestEndpoints:
    async def test_items_arrive_in_order_and_requests_arrive_whole(self, runtime):
        await runtime.serve(WORK, says("a", 3), instance="a")
        assert await collect(runtime.client(WORK), {"x": [1]}) == [("a", {"x": [1]})] * 3

    async def test_the_context_arrives_with_the_request(self, runtime):
        async def handler(request, context):
            yield context.request_id, context.priority

        await runtime.serve(WORK, handler, instance="a")
        stream = runtime.client(WORK).stream(None, RequestContext(request_id="q", priority=3))
        assert [item async for item in stream] == [("q", 3)]

    async def test_instances_take_turns(self, runtime):
        for name in "abc":
            await runtime.serve(WORK, says(name), instance=name)
        client = runtime.client(WORK)
        found = [(await collect(client))[0][0] for _ in range(9)]
        assert sorted(found) == sorted("abc" * 3)
        assert all(len(set(found[i : i + 3])) == 3 for i in range(7))

    async def test_a_random_client_reaches_everybody(self, runtime):
        for name in "ab":
            await runtime.serve(WORK, says(name), instance=name)
        client = runtime.client(WORK, balance=Balance.RANDOM)
        assert {(await collect(client))[0][0] for _ in range(100)} == {"a", "b"}

    async def test_a_named_instance_is_the_one_that_is_called(self, runtime):
        for name in "ab":
            await runtime.serve(WORK, says(name), instance=name)
        client = runtime.client(WORK)
        assert [(await collect(client, instance="b"))[0][0] for _ in range(3)] == ["b"] * 3

    async def test_nobody_and_a_named_instance_that_left_are_told_apart(self, runtime):
        client = runtime.client(WORK)
        with pytest.raises(NoInstance, match=r"tests\.Worker\.generate"):
            await collect(client)
        served = await runtime.serve(WORK, says("a"), instance="a")
        await served.withdraw()
        with pytest.raises(InstanceGone, match="a no longer serves"):
            await collect(client, instance="a")

    async def test_an_instance_serves_an_address_once(self, runtime):
        await runtime.serve(WORK, says("a"), instance="a")
        with pytest.raises(ValueError, match="serves tests"):
            await runtime.serve(WORK, says("a"), instance="a")

    async def test_metadata_is_published_with_the_instance(self, runtime):
        await runtime.serve(WORK, says("a"), instance="a", metadata=b"\x00card")
        assert [(i.id, i.metadata) for i in runtime.client(WORK).instances()] == [("a", b"\x00card")]

    async def test_closing_the_stream_closes_the_handler(self, runtime):
        closed = asyncio.Event()

        async def handler(request, context):
            try:
                while True:
                    yield 1
            finally:
                closed.set()

        served = await runtime.serve(WORK, handler, instance="a")
        async with aclosing(runtime.client(WORK).stream(None, CONTEXT)) as stream:
            assert await anext(stream) == 1
            assert served.in_flight == 1
        await within(1, closed.wait())
        assert served.in_flight == 0

    async def test_cancelling_the_consumer_closes_the_handler(self, runtime):
        began, closed = asyncio.Event(), asyncio.Event()

        async def handler(request, context):
            try:
                began.set()
                await asyncio.Event().wait()
                yield 1
            finally:
                closed.set()

        served = await runtime.serve(WORK, handler, instance="a")
        consumer = asyncio.create_task(collect(runtime.client(WORK)))
        await within(1, began.wait())
        consumer.cancel()
        await within(1, closed.wait())
        await asyncio.gather(consumer, return_exceptions=True)
        assert served.in_flight == 0

    async def test_what_a_handler_raises_reaches_the_caller_as_it_is(self, runtime):
        async def handler(request, context):
            yield 1
            raise RequestRejected("too long", param="prompt")

        await runtime.serve(WORK, handler, instance="a")
        with pytest.raises(RequestRejected, match="too long") as caught:
            await collect(runtime.client(WORK))
        assert caught.value.param == "prompt"


class TestReplacement:
    """An instance that fails before its first item is replaced, once."""

    def failing(self, error, calls, after=0):
        async def handler(request, context):
            calls.append(request)
            for i in range(after):
                yield i
            raise error

        return handler

    async def test_by_another(self, runtime):
        calls = []
        await runtime.serve(WORK, self.failing(EngineDraining("leaving"), calls), instance="a")
        await runtime.serve(WORK, says("b"), instance="b")
        client = runtime.client(WORK)
        assert [(await collect(client))[0][0] for _ in range(4)] == ["b"] * 4
        assert 1 <= len(calls) <= 4

    async def test_only_once(self, runtime):
        calls = []
        for name in "abc":
            await runtime.serve(WORK, self.failing(EngineDraining("leaving"), calls), instance=name)
        with pytest.raises(EngineDraining):
            await collect(runtime.client(WORK))
        assert len(calls) == 2

    async def test_not_after_the_first_item(self, runtime):
        calls = []
        for name in "ab":
            await runtime.serve(WORK, self.failing(EngineDraining("leaving"), calls, after=1), instance=name)
        with pytest.raises(EngineDraining):
            await collect(runtime.client(WORK))
        assert len(calls) == 1

    async def test_not_when_the_request_is_at_fault(self, runtime):
        calls = []
        for name in "ab":
            await runtime.serve(WORK, self.failing(RequestRejected("no"), calls), instance=name)
        with pytest.raises(RequestRejected):
            await collect(runtime.client(WORK))
        assert len(calls) == 1

    async def test_not_when_the_instance_was_named(self, runtime):
        calls = []
        await runtime.serve(WORK, self.failing(EngineDraining("leaving"), calls), instance="a")
        await runtime.serve(WORK, says("b"), instance="b")
        with pytest.raises(EngineDraining):
            await collect(runtime.client(WORK), instance="a")


class TestLeaving:
    async def test_a_withdrawn_instance_finishes_what_it_began(self, runtime):
        go_on = asyncio.Event()

        async def handler(request, context):
            yield 1
            await go_on.wait()
            yield 2

        served = await runtime.serve(WORK, handler, instance="a")
        client = runtime.client(WORK)
        async with aclosing(client.stream(None, CONTEXT)) as stream:
            assert await anext(stream) == 1
            draining = asyncio.create_task(served.drain())
            await asyncio.sleep(0)
            assert client.instances() == []
            assert not draining.done()
            go_on.set()
            assert await anext(stream) == 2
            assert [item async for item in stream] == []
        await within(1, draining)

    async def test_drain_returns_at_once_when_nothing_runs_and_withdraw_is_idempotent(self, runtime):
        served = await runtime.serve(WORK, says("a"), instance="a")
        await within(1, served.drain())
        await served.withdraw()
        await served.close()
        await served.close()

    async def test_a_late_withdrawal_does_not_hit_a_successor_of_the_same_name(self, runtime):
        old = await runtime.serve(WORK, says("old"), instance="a")
        await old.withdraw()
        await runtime.serve(WORK, says("new"), instance="a")
        await old.close()
        assert (await collect(runtime.client(WORK)))[0][0] == "new"


class TestDiscovery:
    async def test_a_watch_tells_what_is_there_and_what_changes(self, runtime):
        await runtime.serve(WORK, says("a"), instance="a")
        async with aclosing(runtime.client(WORK).watch()) as watch:
            event = await within(1, anext(watch))
            assert (event.instance.id, event.live) == ("a", True)
            served = await runtime.serve(WORK, says("b"), instance="b")
            assert (await within(1, anext(watch))).instance.id == "b"
            await served.withdraw()
            event = await within(1, anext(watch))
            assert (event.instance.id, event.live) == ("b", False)

    async def test_waiting_for_instances(self, runtime):
        client = runtime.client(WORK)
        waiting = asyncio.create_task(client.wait_for_instances(2))
        await runtime.serve(WORK, says("a"), instance="a")
        await asyncio.sleep(0)
        assert not waiting.done()
        await runtime.serve(WORK, says("b"), instance="b")
        assert [i.id for i in await within(1, waiting)] == ["a", "b"]
        assert len(await within(1, client.wait_for_instances(1))) == 2

    async def test_a_wait_can_be_given_up(self, runtime):
        with pytest.raises(TimeoutError):
            await within(0.01, runtime.client(WORK).wait_for_instances())

    def test_addresses(self):
        assert Address.parse("dynamo.Processor.chat/completions") == Address("dynamo", "Processor", "chat/completions")
        assert str(WORK) == "tests.Worker.generate"
        with pytest.raises(ValueError, match="expected namespace"):
            Address.parse("Processor.chat")


class TestEvents:
    async def test_subscribers_get_what_is_published_after_them(self, runtime):
        await runtime.publish("kv.a", b"early")
        one, all_ = await runtime.subscribe("kv.a"), await runtime.subscribe("kv.>")
        await runtime.publish("kv.a", b"1")
        await runtime.publish("kv.b", b"2")
        await runtime.publish("other", b"3")
        await one.close()
        await all_.close()
        assert [message async for message in one] == [("kv.a", b"1")]
        assert [message async for message in all_] == [("kv.a", b"1"), ("kv.b", b"2")]

    async def test_a_waiting_subscriber_is_woken_by_a_message_and_by_the_end(self, runtime):
        subscription = await runtime.subscribe("s")
        messages = aiter(subscription)
        waiting = asyncio.create_task(anext(messages))
        await asyncio.sleep(0)
        await runtime.publish("s", b"x")
        assert await within(1, waiting) == ("s", b"x")
        waiting = asyncio.create_task(anext(messages, None))
        await asyncio.sleep(0)
        await subscription.close()
        assert await within(1, waiting) is None

    async def test_a_subscriber_that_lags_too_far_knows_it(self, runtime):
        subscription = await runtime.subscribe("s")
        for i in range(70_000):
            await runtime.publish("s", i.to_bytes(4))
        await subscription.close()
        received = [int.from_bytes(payload) async for _, payload in subscription]
        assert received[-1] == 69_999
        assert len(received) + subscription.dropped == 70_000

    @pytest.mark.parametrize("subject", ["a.*", "a.>.b", "a>", ">"])
    async def test_other_wildcards_are_refused(self, runtime, subject):
        with pytest.raises(ValueError, match="the only wildcard"):
            await runtime.subscribe(subject)


class TestKeys:
    async def test_put_get_delete(self, runtime):
        keys = runtime.keys
        assert await keys.get("a") is None
        await keys.put("a", b"1")
        await keys.put("a", b"2")
        await keys.put("ab", b"3")
        await keys.put("b", b"4")
        assert await keys.get("a") == b"2"
        assert await keys.items("a") == {"a": b"2", "ab": b"3"}
        assert await keys.delete("a") is True
        assert await keys.delete("a") is False

    async def test_a_watch_tells_what_is_there_and_what_changes(self, runtime):
        await runtime.keys.put("p/a", b"1")
        async with aclosing(runtime.keys.watch("p/")) as watch:
            events = [await within(1, anext(watch))]
            await runtime.keys.put("p/b", b"2")
            await runtime.keys.put("q", b"3")
            await runtime.keys.delete("p/a")
            events += [await within(1, anext(watch)) for _ in range(2)]
        assert [(e.key, e.value) for e in events] == [("p/a", b"1"), ("p/b", b"2"), ("p/a", None)]

    async def test_keys_go_with_their_lease_unless_somebody_else_took_them(self, runtime):
        lease = await runtime.keys.lease()
        await runtime.keys.put("a", b"1", lease)
        await runtime.keys.put("b", b"2", lease)
        await runtime.keys.put("b", b"3")
        await lease.revoke()
        await lease.revoke()
        assert await runtime.keys.items("") == {"b": b"3"}
        with pytest.raises(ValueError, match="revoked"):
            await runtime.keys.put("c", b"4", lease)


class TestQueue:
    async def test_first_come_first_served_each_once(self, runtime):
        queue = runtime.queue("q")
        for i in range(3):
            await queue.put(bytes([i]))
        assert await queue.depth() == 3
        tasks = [await within(1, queue.get()) for _ in range(3)]
        assert [t.payload for t in tasks] == [b"\0", b"\1", b"\2"]
        assert all([await t.ack() for t in tasks])
        assert await queue.depth() == 0

    async def test_one_name_is_one_queue(self, runtime):
        await runtime.queue("q").put(b"x")
        assert (await within(1, runtime.queue("q").get())).payload == b"x"

    async def test_every_task_reaches_one_of_many_waiting_consumers(self, runtime):
        queue = runtime.queue("q")
        consumers = [asyncio.create_task(queue.get()) for _ in range(5)]
        await asyncio.sleep(0)
        for i in range(5):
            await queue.put(bytes([i]))
        tasks = await within(1, asyncio.gather(*consumers))
        assert sorted(t.payload for t in tasks) == [bytes([i]) for i in range(5)]

    async def test_a_task_given_back_is_delivered_again(self, runtime):
        queue = runtime.queue("q")
        await queue.put(b"x")
        first = await within(1, queue.get())
        assert await first.nack() is True
        second = await within(1, queue.get())
        assert (first.deliveries, second.deliveries) == (1, 2)
        assert await second.nack(delay=0.01) is True
        third = await within(1, queue.get())
        assert third.deliveries == 3
        assert await third.ack() is True
        assert await third.ack() is False
        assert await third.nack() is False

    async def test_a_task_nobody_settles_is_delivered_again(self, runtime):
        queue = runtime.queue("q", ack_wait=0.02)
        await queue.put(b"x")
        lost = await within(1, queue.get())
        again = await within(1, queue.get())
        assert again.deliveries == 2
        assert await lost.ack() is False
        assert await again.ack() is True

    async def test_progress_keeps_a_task(self, runtime):
        queue = runtime.queue("q", ack_wait=0.2)
        await queue.put(b"x")
        task = await within(1, queue.get())
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.5
        while loop.time() < until:
            await asyncio.sleep(0.05)
            assert await task.in_progress() is True
        assert await queue.depth() == 0
        assert await task.ack() is True

    async def test_a_cancelled_wait_takes_nothing(self, runtime):
        queue = runtime.queue("q")
        with pytest.raises(TimeoutError):
            await within(0.01, queue.get())
        await queue.put(b"x")
        assert await queue.depth() == 1


async def test_closing_the_runtime_ends_everything():
    runtime = LocalRuntime()
    await runtime.serve(WORK, says("a"), instance="a")
    client = runtime.client(WORK)
    watches = [client.watch(), runtime.keys.watch("")]
    subscription = await runtime.subscribe("s")
    await anext(watches[0])
    ends = [asyncio.create_task(anext(w, "end")) for w in (*watches, aiter(subscription))]
    await asyncio.sleep(0)
    await runtime.close()
    await runtime.close()
    found = await within(1, asyncio.gather(*ends))
    assert found[1:] == ["end", "end"]
    assert found[0] == "end" or found[0].live is False
    assert client.instances() == []


async def test_items_of_the_local_runtime_are_not_copied():
    item = ["anything"]

    async def handler(request, context):
        yield item

    async with LocalRuntime() as runtime:
        await runtime.serve(WORK, handler, instance="a")
        assert (await collect(runtime.client(WORK)))[0] is item
