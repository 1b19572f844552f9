"""Both sides of a remote prefill, with engines whose tokens depend on every byte of KV."""

from __future__ import annotations

import asyncio

import pytest

from core.messages import EngineDead, EngineError, FinishReason, Overloaded, Rendezvous, RequestRejected
from core.prefill.messages import AttemptFailed, ClaimKv, KvReady, SettleAttempt, TaskTaken
from core.prefill.wire import LocalWire, WireError
from tests.prefill.byte_engine import POISON
from tests.prefill.house import House, ask

KINDS = list(Rendezvous)


@pytest.fixture(params=KINDS, ids=[str(kind) for kind in KINDS])
def kind(request):
    return request.param


@pytest.mark.parametrize("samples_first", [False, True], ids=["continues", "samples first"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 17, 64])
async def test_tokens_are_those_of_an_aggregated_engine(kind, length, samples_first):
    async with House(kind, samples_first=samples_first) as house:
        request = ask("r", *range(20, 20 + length))
        assert (await house.say(request))[0] == await house.expected(request)
        await house.quiet()
        assert house.engines["d0"].calls["import"] == 1
        assert house.engines["p0"].calls["prefill"] == 1
        assert house.decoders[0].counts().imported == 1
        assert house.prefillers[0].counts().imported == 1
        assert house.queue.counts().acknowledged == 1
        assert house.decoders[0].times.queue.count == 1
        assert house.decoders[0].times.transfer.count == 1


async def test_many_requests_on_many_workers(kind):
    async with House(kind, decode=2, prefill=3, blocks=256) as house:
        requests = [ask(f"r{i}", i + 20, *range(i % 7 + 1)) for i in range(40)]
        said = await asyncio.gather(*(house.say(r, house.decoders[i % 2]) for i, r in enumerate(requests)))
        for request, (tokens, finish) in zip(requests, said, strict=True):
            assert tokens == await house.expected(request)
            assert finish in (FinishReason.LENGTH, FinishReason.STOP)
        assert sum(side.ends["imported"] for side in house.decoders) == 40


async def test_a_sequence_that_ends_with_its_first_token_needs_no_kv(kind):
    async with House(kind) as house:
        request = ask("r", max_tokens=1)
        assert await house.say(request) == (await house.expected(request), FinishReason.LENGTH)
        if kind is not Rendezvous.HANDSHAKE:
            assert house.engines["d0"].calls["import"] == 0
            assert house.engines["d0"].calls["decode"] == 0


async def test_cached_tokens_are_those_of_the_prefill_side(kind):
    async with House(kind) as house:
        first = await anext(house.stream(ask("r")))
        if kind is not Rendezvous.HANDSHAKE:
            assert first.cached_tokens == 2


# Aborts, at every state.

POINTS = [("d0", "reserve"), ("p0", "prefill"), ("p0", "export"), ("p0", "write"), ("d0", "import"), ("d0", "read"),
          ("d0", "decode")]  # fmt: skip


def _passes(kind: Rendezvous, point: str) -> bool:
    """Whether this kind comes by that point."""
    return {"write": kind is not Rendezvous.PULL, "read": kind is Rendezvous.PULL}.get(point, True)


CASES = [pytest.param(k, w, p, id=f"{k}-{w}-{p}") for k in KINDS for w, p in POINTS if _passes(k, p)]


@pytest.mark.parametrize("how", ["abort", "close"])
@pytest.mark.parametrize(("kind", "worker", "point"), CASES)
async def test_abort_at_every_state_releases_every_party(kind, worker, point, how):
    async with House(kind) as house:
        gate = house.engines[worker].gates[point]
        gate.close()
        speaking = asyncio.create_task(house.say(ask("r")))
        await asyncio.wait_for(gate.arrived.wait(), 5)
        if how == "abort":
            await house.decoders[0].abort("r")
            _, finish = await asyncio.wait_for(speaking, 5)
            assert finish is FinishReason.ABORT
        else:
            speaking.cancel()
            await asyncio.gather(speaking, return_exceptions=True)
        gate.open.set()


async def test_abort_while_the_task_is_queued(kind):
    async with House(kind, prefill=0) as house:
        speaking = asyncio.create_task(house.say(ask("r")))
        await _until(lambda: house.queue.counts().submitted == 1)
        await house.decoders[0].abort("r")
        assert (await speaking)[1] is FinishReason.ABORT
        await house.quiet()
        assert house.queue.counts().cancelled == 1
        assert await house.queue.depth() == 0


async def test_aborting_what_is_unknown_does_nothing(kind):
    async with House(kind) as house:
        await house.decoders[0].abort("nobody")
        await house.say(ask("r"))
        await house.decoders[0].abort("r")


# Failures.


@pytest.mark.parametrize(("worker", "point"), POINTS[:-1], ids=[f"{w}-{p}" for w, p in POINTS[:-1]])
@pytest.mark.parametrize("error", [EngineError("bad luck"), ValueError("a defect")], ids=["engine error", "defect"])
async def test_a_failure_at_every_state_ends_in_the_right_tokens(kind, worker, point, error):
    async with House(kind, prefill_attempts=1, poisoned_prefill="local") as house:
        house.engines[worker].gates[point].fail(error)
        request = ask("r")
        assert (await house.say(request))[0] == await house.expected(request)


async def test_a_failed_try_is_made_again(kind):
    async with House(kind) as house:
        house.engines["p0"].gates["prefill"].fail(EngineError("bad luck"), EngineError("again"))
        request = ask("r")
        assert (await house.say(request))[0] == await house.expected(request)
        assert house.decoders[0].ends == {"imported": 1}
        assert house.queue.counts().retried == 2


async def test_a_poisoned_task_is_a_dead_letter_and_one_error_for_the_client(kind):
    async with House(kind, prefill=2) as house:
        for name in ("p0", "p1"):
            house.engines[name].gates["prefill"].fail(*[EngineError("this prompt is evil")] * 3)
        with pytest.raises(EngineError, match="this prompt is evil"):
            await house.say(ask("r"))
        (letter,) = await house.queue.dead_letters()
        assert letter.attempts == 3
        assert house.engines["d0"].calls["decode"] == 0


async def test_a_request_at_fault_is_rejected_at_once(kind):
    async with House(kind) as house:
        with pytest.raises(RequestRejected, match="does not like 13") as error:
            await house.say(ask("r", POISON, 2, 3))
        assert error.value.param == "prompt"
        assert house.engines["p0"].calls["prefill"] == 1
        assert await house.queue.dead_letters() == []


async def test_without_fallback_there_is_one_error(kind):
    async with House(kind, prefill=0, prefill_fallback="error", prefill_queue_timeout=0.05) as house:
        with pytest.raises(EngineError, match=r"Waited 0\.05 s for a prefill worker"):
            await house.say(ask("r"))


async def test_no_prefill_worker_means_prefilled_here(kind):
    async with House(kind, prefill=0, prefill_queue_timeout=0.05) as house:
        request = ask("r")
        assert (await house.say(request))[0] == await house.expected(request)
        assert house.decoders[0].ends == {"fallback to local": 1}


async def test_a_full_queue_means_prefilled_here_or_overloaded(kind):
    for fallback in ("local", "error"):
        async with House(kind, prefill=0, prefill_queue_capacity=1, prefill_fallback=fallback) as house:
            first = asyncio.create_task(house.say(ask("first")))
            await _until(lambda house=house: house.queue.counts().submitted == 1)
            if fallback == "local":
                request = ask("second")
                assert (await house.say(request))[0] == await house.expected(request)
            else:
                with pytest.raises(Overloaded) as error:
                    await house.say(ask("second"))
                assert error.value.retry_after > 0
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)


async def test_a_queue_that_fails_midway_means_prefilled_here(kind):
    async with House(kind) as house:
        await house.say(ask("a"))
        await house.queue.close()
        request = ask("b")
        assert (await house.say(request))[0] == await house.expected(request)


async def test_no_room_on_the_decode_side_means_that_decode_waits_by_itself(kind):
    async with House(kind) as house:
        house.engines["d0"].gates["reserve"].fail(Overloaded("full"))
        request = ask("r")
        assert (await house.say(request))[0] == await house.expected(request)


@pytest.mark.parametrize(
    ("kind", "point"), [(k, p) for k in KINDS for p in ("prefill", "export", "write") if _passes(k, p)]
)
async def test_a_hanging_prefill_is_given_up(kind, point):
    async with House(kind, prefill_timeout=0.2, kv_transfer_timeout=0.2, stop_timeout=0.2) as house:
        house.engines["p0"].gates[point].close()
        request = ask("r")
        began = asyncio.get_running_loop().time()
        assert (await house.say(request))[0] == await house.expected(request)
        assert asyncio.get_running_loop().time() - began < 5
        assert house.decoders[0].ends["fallback to local"] == 1


async def test_a_hanging_import_is_given_up(kind):
    async with House(kind, prefill_timeout=0.2, kv_transfer_timeout=0.2) as house:
        house.engines["d0"].gates["import"].close()
        request = ask("r")
        assert (await house.say(request))[0] == await house.expected(request)
        await house.quiet()
        assert house.prefillers[0].counts().released == 1


@pytest.mark.parametrize("point", ["prefill", "export"])
async def test_a_prefill_worker_that_dies_is_replaced(kind, point):
    async with House(kind) as house:
        gate = house.engines["p0"].gates[point]
        gate.close()
        request = ask("r")
        speaking = asyncio.create_task(house.say(request))
        await asyncio.wait_for(gate.arrived.wait(), 5)
        await house.kill_prefiller(0)
        await house.add_prefiller("p1")
        assert (await asyncio.wait_for(speaking, 5))[0] == await house.expected(request)
        assert house.decoders[0].ends["imported"] == 1
        assert house.engines["p1"].calls["prefill"] == 1
        if kind is not Rendezvous.PULL:
            house.decoders[0].rooms._ledger.expire(float("inf"))  # the dead writer's room waits for its lease
            house.engines["d0"]._free(next(iter(house.engines["d0"].sessions)))


async def test_after_the_last_dead_worker_the_prompt_is_prefilled_here(kind):
    async with House(kind, prefill=0) as house:
        request = ask("r")
        speaking = asyncio.create_task(house.say(request))
        for i in range(3):
            name = f"p{i}"
            await house.add_prefiller(name)
            gate = house.engines[name].gates["prefill"]
            gate.close()
            if gate.passed == 0:
                await asyncio.wait_for(gate.arrived.wait(), 5)
            await house.kill_prefiller(0)
        await house.add_prefiller("p3")
        assert (await asyncio.wait_for(speaking, 5))[0] == await house.expected(request)
        assert house.decoders[0].ends["fallback to local"] == 1
        assert len(await house.queue.dead_letters()) == 1
        _end_leases(house)


async def test_a_decode_worker_that_dies_leaves_nothing_behind(kind):
    times = {"prefill_timeout": 0.5, "kv_transfer_timeout": 0.3, "stop_timeout": 0.2, "kv_lease": 0.5}
    async with House(kind, decode=2, **times) as house:
        gate = house.engines["p0"].gates["prefill"]
        gate.close()
        speaking = asyncio.create_task(house.say(ask("r"), house.decoders[1]))
        await asyncio.wait_for(gate.arrived.wait(), 5)
        dead = house.decoders.pop(1)
        await house.wire.withdraw(dead.address)
        speaking.cancel()
        await asyncio.gather(speaking, return_exceptions=True)
        for task in list(dead._tasks):
            task.cancel()
        if dead.rooms._expiry is not None:
            dead.rooms._expiry.cancel()
        for session in list(house.engines["d1"].sessions):
            house.engines["d1"]._free(session)
        gate.open.set()
        await _until(lambda: house.queue.counts().acknowledged == 1)


async def test_a_dead_engine_takes_no_more(kind):
    async with House(kind) as house:
        house.engines["p0"].gates["prefill"].fail(EngineDead("out of memory"))
        request = ask("r")
        speaking = asyncio.create_task(house.say(request))
        await _until(lambda: house.queue.counts().returned == 1)
        await house.add_prefiller("p1")
        assert (await speaking)[0] == await house.expected(request)
        assert house.engines["p0"].calls["prefill"] == 1


async def test_a_leaving_prefill_worker_gives_its_tasks_to_others(kind):
    async with House(kind) as house:
        gate = house.engines["p0"].gates["prefill"]
        gate.close()
        request = ask("r")
        speaking = asyncio.create_task(house.say(request))
        await asyncio.wait_for(gate.arrived.wait(), 5)
        leaving = asyncio.create_task(house.prefillers[0].close())
        await house.add_prefiller("p1")
        assert (await asyncio.wait_for(speaking, 5))[0] == await house.expected(request)
        await leaving
        assert house.engines["p1"].calls["prefill"] == 1


async def test_a_draining_prefill_worker_ends_what_it_has(kind):
    async with House(kind) as house:
        gate = house.engines["p0"].gates["prefill"]
        gate.close()
        request = ask("r")
        speaking = asyncio.create_task(house.say(request))
        await asyncio.wait_for(gate.arrived.wait(), 5)
        draining = asyncio.create_task(house.prefillers[0].drain())
        gate.open.set()
        assert (await asyncio.wait_for(speaking, 5))[0] == await house.expected(request)
        await asyncio.wait_for(draining, 5)


async def test_engines_that_share_no_way_are_told_so(kind):
    other = KINDS[(KINDS.index(kind) + 1) % 3]
    async with House(kind, prefill=0, prefill_fallback="error") as house:
        await house.add_prefiller("p0", kind=other)
        with pytest.raises(EngineError, match=f"moves KV by {other}, decode worker 'd0' by {kind}"):
            await house.say(ask("r"))


async def test_workers_of_different_models_are_told_which_field_differs(kind):
    sentence = "model is 'bytes' on decode worker 'd0' and 'other' on prefill worker 'p0'"
    async with House(kind, prefill=0, prefill_fallback="error") as house:
        await house.add_prefiller("p0", model="other")
        with pytest.raises(EngineError, match=sentence):
            await house.say(ask("r"))
        assert house.engines["p0"].calls["prefill"] == 0


async def test_a_ticket_for_other_weights_is_refused_at_the_import():
    async with House() as house:
        house.engines["p0"].exports = "other weights"
        request = ask("r")
        assert (await house.say(request))[0] == await house.expected(request)
        assert house.decoders[0].ends == {"fallback to local": 1}
        assert house.engines["d0"].calls["import"] == 0


# Leases.


async def test_a_late_pull_is_refused_and_never_read():
    async with House(Rendezvous.PULL, kv_lease=0.6) as house:
        house.wire = None
        gate = house.engines["d0"].gates["read"]
        gate.close()
        request = ask("r")
        speaking = asyncio.create_task(house.say(request))
        await asyncio.wait_for(gate.arrived.wait(), 5)
        tokens, _ = await asyncio.wait_for(speaking, 5)
        assert gate.passed == 0
        assert tokens == await house.expected(request)
        assert house.decoders[0].ends == {"fallback to local": 1}


class LossyWire(LocalWire):
    """Loses the questions of a kind."""

    def __init__(self, *lost: type) -> None:
        super().__init__()
        self.lost = lost

    async def ask(self, address, question, timeout):  # noqa: ASYNC109
        if isinstance(question, self.lost):
            await asyncio.sleep(timeout)
            raise WireError(f"{type(question).__name__} is lost")
        return await super().ask(address, question, timeout)


async def test_a_holder_that_hears_nothing_frees_its_blocks_when_the_lease_ends():
    wire = LossyWire(SettleAttempt)
    async with House(Rendezvous.PULL, wire=wire, kv_lease=0.3, answer_timeout=0.1) as house:
        request = ask("r")
        assert (await house.say(request))[0] == await house.expected(request)
        await _until(lambda: house.prefillers[0].counts().expired == 1)
        await _until(lambda: house.queue.counts().acknowledged == 1)
        assert house.engines["p0"].calls["prefill"] == 1


LOST = [TaskTaken, KvReady, AttemptFailed, ClaimKv, SettleAttempt]


@pytest.mark.parametrize(
    ("kind", "lost"), [(k, m) for k in KINDS for m in LOST if m is not ClaimKv or k is Rendezvous.PULL]
)
async def test_lost_messages_are_made_good_by_deadlines(kind, lost):
    times = {"prefill_queue_timeout": 0.3, "prefill_timeout": 0.3, "kv_transfer_timeout": 0.3, "answer_timeout": 0.05}
    async with House(kind, wire=LossyWire(lost), kv_lease=0.5, reserve_timeout=0.1, stop_timeout=0.1, **times) as house:
        if lost is AttemptFailed:
            house.engines["p0"].gates["prefill"].fail(EngineError("bad luck"))
        request = ask("r")
        assert (await asyncio.wait_for(house.say(request), 10))[0] == await house.expected(request)
        _end_leases(house)
        house.wire.lost = ()
        await _until(lambda: not house.queue._entries)


async def test_a_ticket_under_another_secret_is_refused(kind):
    async with House(kind, prefill=0) as house:
        await house.add_prefiller("p0", secret="some other deployment's secret")
        request = ask("r")
        assert (await house.say(request))[0] == await house.expected(request)
        assert house.decoders[0].ends == {"fallback to local": 1}
        assert house.engines["d0"].calls["import"] == 0


async def test_five_hundred_requests_with_random_cancellation_leave_nothing(kind):
    import random

    dice = random.Random(7)
    async with House(kind, decode=2, prefill=2, blocks=4096, prefill_concurrency=32) as house:

        async def one(i: int) -> None:
            request = ask(f"r{i}", i % 100 + 20, *range(i % 11))
            speaking = asyncio.create_task(house.say(request, house.decoders[i % 2]))
            if dice.random() < 0.5:
                for _ in range(dice.randrange(60)):
                    await asyncio.sleep(0)
                if dice.random() < 0.5:
                    speaking.cancel()
                    await asyncio.gather(speaking, return_exceptions=True)
                    return
                await house.decoders[i % 2].abort(request.request_id)
                await speaking
            else:
                assert (await speaking)[0] == await house.expected(request)

        await asyncio.gather(*(one(i) for i in range(500)))


def _end_leases(house: House) -> None:
    """Rooms that dead writers may still have written to are free when their leases are over."""
    for side in house.decoders:
        for name, _ in side.rooms._ledger.expire(float("inf")):
            side.rooms.free(name)


async def _until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
