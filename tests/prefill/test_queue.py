"""One suite for both prefill queues."""

from __future__ import annotations

import asyncio
import time

import pytest

from core.messages import Overloaded
from core.prefill.queue import QueueSettings, QueueUnavailable, Room
from tests.prefill.queues import ONE, PLENTY, LocalHouse, NatsHouse, make_task

FAST = QueueSettings(ack_wait=0.6, retry_delay=0.05)


@pytest.fixture(params=["local", "nats"])
async def house(request):
    house = LocalHouse() if request.param == "local" else NatsHouse(request.getfixturevalue("nats_server").url)
    yield house
    await house.close()


async def test_tasks_come_in_the_order_in_which_they_were_submitted(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    for name in "abc":
        await queue.submit(make_task(name))
    assert await queue.depth() == 3
    names = []
    for _ in range(3):
        (taken,) = await taker.take(ONE, 5)
        names.append(taken.task.task_id)
        assert taken.attempt == 1
        assert taken.task == make_task(names[-1])
        await taken.ack()
    assert names == ["a", "b", "c"]
    assert await taker.take(ONE, 0) == []
    assert queue.counts().submitted == 3


async def test_a_waiting_taker_gets_a_task_when_it_comes(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    waiting = asyncio.create_task(taker.take(ONE, 10))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await queue.submit(make_task("a"))
    (taken,) = await waiting
    assert time.monotonic() - began < 2
    await taken.ack()


async def test_each_task_goes_to_one_taker(house):
    queue = await house.queue(FAST)
    takers = [await house.taker(f"p{i}") for i in range(3)]
    for i in range(30):
        await queue.submit(make_task(str(i)))
    seen = []

    async def work(taker):
        while len(seen) < 30:
            for taken in await taker.take(Room(2, 1 << 20), 0.2):
                seen.append(taken.task.task_id)
                await taken.ack()

    await asyncio.wait_for(asyncio.gather(*(work(taker) for taker in takers)), 20)
    assert sorted(seen, key=int) == [str(i) for i in range(30)]


async def test_higher_priority_is_served_first_and_levels_are_clamped(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    for name, priority in [("low", -9), ("plain", 0), ("high", 1), ("later", 0), ("top", 99)]:
        await queue.submit(make_task(name, priority=priority))
    taken = await taker.take(PLENTY, 5)
    assert [item.task.task_id for item in taken] == ["top", "high", "plain", "later", "low"]


async def test_depth_counts_waiting_tasks_only(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    for name in "abcd":
        await queue.submit(make_task(name))
    first, second = await taker.take(Room(2, 1 << 20), 5)
    await _until(queue.depth, 2)
    await first.ack()
    await second.retry()
    await _until(queue.depth, 3)


async def test_a_batch_takes_what_there_is_room_for(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    for name, tokens in [("a", 30), ("b", 30), ("c", 30), ("d", 10)]:
        await queue.submit(make_task(name, tokens=tokens))
    taken = await taker.take(Room(8, 75), 5)
    assert [item.task.task_id for item in taken] == ["a", "b", "d"]
    assert await taker.take(Room(0, 1000), 0) == []
    assert await taker.take(Room(1, 20), 0.05) == []


async def test_an_idle_worker_takes_one_task_however_long(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    await queue.submit(make_task("huge", tokens=5000))
    await queue.submit(make_task("small"))
    (taken,) = await taker.take(Room(4, 100, idle=True), 5)
    assert taken.task.task_id == "huge"


async def test_a_dead_takers_task_goes_to_another(house):
    queue = await house.queue(FAST)
    doomed, other = await house.taker("p0"), await house.taker("p1")
    await queue.submit(make_task("a"))
    (lost,) = await doomed.take(ONE, 5)
    assert lost.attempt == 1
    await house.die(doomed)
    (taken,) = await other.take(ONE, 10)
    assert (taken.task.task_id, taken.attempt, taken.silent) == ("a", 2, True)
    await taken.ack()
    assert await other.take(ONE, 0) == []


async def test_a_living_taker_keeps_its_task_for_as_long_as_it_works(house):
    queue = await house.queue(FAST)
    slow, other = await house.taker("p0"), await house.taker("p1")
    await queue.submit(make_task("a"))
    (taken,) = await slow.take(ONE, 5)
    assert await other.take(ONE, 3 * FAST.ack_wait) == []
    await taken.ack()
    assert await other.take(ONE, FAST.ack_wait) == []


async def test_a_failed_try_is_counted_and_the_last_one_is_known(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    await queue.submit(make_task("bad"))
    for attempt in (1, 2, 3):
        (taken,) = await taker.take(ONE, 5)
        assert (taken.attempt, taken.last, taken.exhausted) == (attempt, attempt == 3, False)
        if attempt < 3:
            await taken.retry()
    await taken.bury("fails everywhere")
    assert await taker.take(ONE, 0.3) == []
    (letter,) = await queue.dead_letters()
    assert (letter.task.task_id, letter.reason, letter.attempts) == ("bad", "fails everywhere", 3)


async def test_a_task_that_kills_every_taker_is_seen_to_be_exhausted(house):
    queue = await house.queue(FAST)
    await queue.submit(make_task("killer"))
    for attempt in (1, 2, 3):
        taker = await house.taker(f"p{attempt}")
        (taken,) = await taker.take(ONE, 10)
        assert (taken.attempt, taken.exhausted) == (attempt, False)
        await house.die(taker)
    taker = await house.taker("p4")
    (taken,) = await taker.take(ONE, 10)
    assert taken.exhausted
    assert taken.silent
    await taken.bury("nobody survives it")
    assert len(await queue.dead_letters()) == 1
    assert await queue.depth() == 0


async def test_giving_back_is_no_try(house):
    queue = await house.queue(FAST)
    taker, other = await house.taker("p0"), await house.taker("p1")
    await queue.submit(make_task("a"))
    (taken,) = await taker.take(ONE, 5)
    await taken.retry()
    (taken,) = await taker.take(ONE, 5)
    assert taken.attempt == 2
    await taken.give_back()
    (taken,) = await other.take(ONE, 5)
    assert taken.attempt == 2
    assert not taken.silent
    await taken.ack()


async def test_a_closed_taker_gives_back_what_it_has(house):
    queue = await house.queue(FAST)
    taker, other = await house.taker("p0"), await house.taker("p1")
    for name in "ab":
        await queue.submit(make_task(name))
    assert len(await taker.take(PLENTY, 5)) == 2
    began = time.monotonic()
    await taker.close()
    found = []
    while len(found) < 2:
        found += await other.take(PLENTY, 5)
    assert time.monotonic() - began < 5
    assert {item.task.task_id for item in found} == {"a", "b"}
    assert {item.attempt for item in found} == {1}


async def test_only_the_first_end_counts(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    await queue.submit(make_task("a"))
    (taken,) = await taker.take(ONE, 5)
    await taken.ack()
    await taken.retry()
    await taken.give_back()
    await taken.bury("no")
    assert await taker.take(ONE, 0.3) == []
    assert await queue.dead_letters() == []


async def test_a_cancelled_task_is_not_delivered(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    for name in "abc":
        await queue.submit(make_task(name))
    await queue.cancel("b")
    await queue.cancel("b")
    await queue.cancel("never seen")
    taken = await taker.take(PLENTY, 5)
    assert [item.task.task_id for item in taken] == ["a", "c"]
    await queue.cancel("a")
    await taken[0].retry()
    assert await taker.take(PLENTY, 0.3) == []
    assert queue.counts().cancelled == 2


async def test_a_full_queue_says_when_to_come_again(house):
    queue = await house.queue(QueueSettings(capacity=2))
    taker = await house.taker("p0")
    queue.observe_wait(6.0)
    await queue.submit(make_task("a"))
    await queue.submit(make_task("b"))
    with pytest.raises(Overloaded, match="full: 2 tasks") as error:
        await queue.submit(make_task("c"))
    assert error.value.retry_after == pytest.approx(2.0)
    (taken,) = await taker.take(ONE, 5)
    with pytest.raises(Overloaded):
        await queue.submit(make_task("c"))
    await taken.ack()
    await queue.submit(make_task("c"))
    assert queue.counts().refused == 2


async def test_submitting_twice_queues_once(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    await queue.submit(make_task("a"))
    await queue.submit(make_task("a"))
    assert len(await taker.take(PLENTY, 5)) == 1
    assert await taker.take(PLENTY, 0) == []


async def test_a_cancelled_wait_takes_none(house):
    queue = await house.queue(FAST)
    taker, other = await house.taker("p0"), await house.taker("p1")
    waiting = asyncio.create_task(taker.take(ONE, 10))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await queue.submit(make_task("a"))
    (taken,) = await other.take(ONE, 5)
    assert taken.attempt == 1
    await taken.ack()


async def test_a_closed_queue_is_unavailable(house):
    queue = await house.queue(FAST)
    await queue.close()
    with pytest.raises(QueueUnavailable, match="closed"):
        await queue.submit(make_task("a"))
    with pytest.raises(QueueUnavailable, match="closed"):
        await queue.depth()


async def test_a_taker_prefers_the_task_whose_prefix_it_holds(house):
    queue = await house.queue(FAST)
    taker = await house.taker("p0")
    for name, prefix in [("a", 1), ("b", 2), ("c", 1), ("d", 2)]:
        await queue.submit(make_task(name, prefix=prefix))

    def held(task):
        return task.tokens if task.request.token_ids[0] == 2 else 0

    names = []
    for _ in range(4):
        (taken,) = await taker.take(ONE, 5, held)
        names.append(taken.task.task_id)
        await taken.ack()
    assert names == ["b", "d", "a", "c"]


async def test_nobody_is_overtaken_more_often_than_allowed(house):
    queue = await house.queue(QueueSettings(window=4, max_overtakes=2))
    taker = await house.taker("p0")
    await queue.submit(make_task("cold", prefix=1))
    for i in range(6):
        await queue.submit(make_task(f"warm{i}", prefix=2))

    def held(task):
        return task.tokens if task.request.token_ids[0] == 2 else 0

    names = []
    for _ in range(7):
        (taken,) = await taker.take(ONE, 5, held)
        names.append(taken.task.task_id)
        await taken.ack()
    assert names == ["warm0", "warm1", "cold", "warm2", "warm3", "warm4", "warm5"]


async def test_a_task_too_big_for_the_room_is_not_starved_by_small_ones(house):
    queue = await house.queue(QueueSettings(max_overtakes=2))
    taker = await house.taker("p0")
    await queue.submit(make_task("big", tokens=100))
    for i in range(4):
        await queue.submit(make_task(f"small{i}"))
    names = []
    for _ in range(2):
        (taken,) = await taker.take(Room(1, 50), 5)
        names.append(taken.task.task_id)
        await taken.ack()
    assert names == ["small0", "small1"]
    assert await taker.take(Room(1, 50), 0.1) == []
    (taken,) = await taker.take(Room(1, 120), 5)
    assert taken.task.task_id == "big"


async def _until(ask, value):
    async with asyncio.timeout(5):
        while await ask() != value:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
