"""The router's queue: order, bounds, deadlines, cancellation."""

import asyncio

import pytest

from core.messages import Overloaded
from core.routing.config import QueueOrder
from core.routing.queue import RouterQueue


class Room:
    """Seats that attempts take."""

    def __init__(self, queue, seats=0):
        self.queue = queue
        self.seats = seats
        self.served = []
        self.undone = []

    def submit(self, name, **options):
        def attempt():
            if not self.seats:
                return None
            self.seats -= 1
            self.served.append(name)
            return name

        return asyncio.create_task(self.queue.submit(attempt, undo=self.undone.append, **options))

    async def fill(self, names, **options):
        tasks = [self.submit(name, **options) for name in names]
        await asyncio.sleep(0)
        return tasks

    def free(self, seats=1):
        self.seats += seats
        self.queue.poke()
        self.queue.check_integrity()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(clock):
    return RouterQueue(4, clock=clock)


async def test_nobody_waits_while_there_is_room(queue):
    room = Room(queue, seats=1)
    assert await room.submit("a") == "a"
    assert len(queue) == 0


async def test_first_come_first_served(queue):
    room = Room(queue)
    tasks = await room.fill("abc")
    assert len(queue) == 3
    room.free(2)
    assert room.served == ["a", "b"]
    room.free()
    assert await asyncio.gather(*tasks) == ["a", "b", "c"]


async def test_larger_priority_first_and_fair_among_equals(clock):
    queue = RouterQueue(10, QueueOrder.PRIORITY, clock=clock)
    room = Room(queue)
    tasks = [room.submit(name, priority=priority) for name, priority in [("a", 0), ("b", 5), ("c", 5), ("d", 9)]]
    await asyncio.sleep(0)
    room.free(4)
    await asyncio.gather(*tasks)
    assert room.served == ["d", "b", "c", "a"]


async def test_fcfs_does_not_look_at_priority(queue):
    room = Room(queue)
    tasks = [room.submit(name, priority=priority) for name, priority in [("a", 0), ("b", 5)]]
    await asyncio.sleep(0)
    room.free(2)
    await asyncio.gather(*tasks)
    assert room.served == ["a", "b"]


async def test_a_newcomer_does_not_pass_those_who_wait(queue):
    room = Room(queue)
    first = room.submit("a")
    await asyncio.sleep(0)
    room.seats = 1
    second = room.submit("b")
    await asyncio.sleep(0)
    assert room.served == []
    queue.poke()
    assert await first == "a"
    room.free()
    assert await second == "b"


async def test_past_its_bound_the_queue_refuses_and_says_when_to_come_back(queue, clock):
    room = Room(queue)
    tasks = await room.fill("abcd")
    with pytest.raises(Overloaded, match="4 requests wait already") as caught:
        await room.submit("e")
    assert caught.value.retry_after == 1.0
    for _ in range(2):
        clock.now += 3.0
        room.free()
    tasks += await room.fill("fg")
    with pytest.raises(Overloaded) as caught:
        await room.submit("h")
    assert caught.value.retry_after == pytest.approx(4 * 3.0)
    room.free(4)
    await asyncio.gather(*tasks)


async def test_one_that_waits_too_long_is_refused_and_leaves_its_place(queue):
    room = Room(queue)
    late = room.submit("late", timeout=0.01)
    tasks = await room.fill("ab")
    with pytest.raises(Overloaded, match=r"saturated for 0\.0 seconds"):
        await late
    assert len(queue) == 2
    room.free(2)
    await asyncio.gather(*tasks)
    assert room.served == ["a", "b"]


async def test_one_that_is_cancelled_leaves_its_place(queue):
    room = Room(queue)
    tasks = await room.fill("abcd")
    for task in tasks[:3]:
        task.cancel()
    await asyncio.wait(tasks[:3])
    assert len(queue) == 1
    queue.check_integrity()
    room.free()
    assert await tasks[3] == "d"


async def test_a_result_that_nobody_takes_is_undone(queue):
    room = Room(queue)
    [task] = await room.fill("a")
    room.free()
    task.cancel()  # after the result was set, before the task ran
    with pytest.raises(asyncio.CancelledError):
        await task
    assert room.undone == ["a"]


async def test_an_attempt_that_raises_fails_its_own_request_only(queue):
    def broken():
        if broken.armed:
            raise ValueError("no such token")

    broken.armed = False
    failing = asyncio.create_task(queue.submit(broken))
    await asyncio.sleep(0)
    room = Room(queue)
    [waiting] = await room.fill("a")
    broken.armed = True
    room.free()
    with pytest.raises(ValueError, match="no such token"):
        await failing
    assert await waiting == "a"
    assert len(queue) == 0
