"""One suite for every wire."""

from __future__ import annotations

import asyncio
import time

import pytest

from core.kv.session import Outcome
from core.messages import Delta, KvReservation, KvTicket, Rendezvous
from core.prefill import runtime_wire
from core.prefill.messages import (
    AttemptFailed,
    Claimed,
    ClaimKv,
    ClaimRefused,
    FailureKind,
    Gone,
    KvReady,
    Noted,
    Proceed,
    SettleAttempt,
    TaskTaken,
)
from core.prefill.runtime_wire import RuntimeWire
from core.prefill.wire import LocalWire, Unreachable, WireError
from core.runtime.local import LocalRuntime
from tests.prefill.house import House, ask

TICKET = KvTicket(
    engine="e",
    engine_version="1",
    fingerprint={},
    session="s",
    worker_id="p",
    rendezvous=Rendezvous.PULL,
    expires_in=1.0,
    num_tokens=1,
    canonical=True,
    payload={"blocks": [1], "raw": b"\x00"},
    mac=b"m",
)
TAKEN = TaskTaken(
    task_id="t", attempt="a", delivery=1, worker_id="p", incarnation="i", reply_to="p.i", rendezvous=Rendezvous.PUSH
)
TALK = [
    (TAKEN, Proceed(reservation=KvReservation(session="r", num_tokens=3, cached_tokens=1, payload=[1]), seconds=2.0)),
    (KvReady(task_id="t", attempt="a", ticket=TICKET, first=Delta([5])), Noted()),
    (AttemptFailed(task_id="t", attempt="", kind=FailureKind.POISONED, message="no"), Gone("over")),
    (ClaimKv(task_id="t", attempt="a", session="s", nonce="n"), Claimed(3.5)),
    (SettleAttempt(task_id="t", attempt="a", outcome=Outcome.IMPORTED), ClaimRefused("late")),
]


@pytest.fixture(params=["local", "runtime"])
async def wire(request, monkeypatch):
    monkeypatch.setattr(runtime_wire, "DISCOVERY", 0.2)
    if request.param == "local":
        yield LocalWire()
        return
    async with LocalRuntime() as runtime:
        yield RuntimeWire(runtime, "test")


@pytest.mark.parametrize(("question", "answer"), TALK, ids=[type(q).__name__ for q, _ in TALK])
async def test_questions_and_answers_arrive_as_they_are(wire, question, answer):
    heard = []

    async def handle(asked):
        heard.append(asked)
        return answer

    await wire.serve("d.1", handle)
    assert await wire.ask("d.1", question, 5) == answer
    assert heard == [question]


async def test_each_address_has_its_own_answers(wire):
    for name in "xy":

        async def handle(_, name=name):
            return Gone(name)

        await wire.serve(name, handle)
    assert [await wire.ask(name, TAKEN, 5) for name in "xyx"] == [Gone("x"), Gone("y"), Gone("x")]


async def test_an_address_that_nobody_serves_is_known_to_be_dead(wire):
    with pytest.raises(Unreachable, match="no worker answers at 'nobody'"):
        await wire.ask("nobody", TAKEN, 5)

    async def handle(_):
        return Noted()

    await wire.serve("d.1", handle)
    await wire.ask("d.1", TAKEN, 5)
    await wire.withdraw("d.1")
    await wire.withdraw("d.1")
    with pytest.raises(Unreachable):
        await wire.ask("d.1", TAKEN, 5)


async def test_a_worker_that_does_not_answer_in_time_is_no_dead_one(wire):
    async def handle(_):
        await asyncio.Event().wait()

    await wire.serve("d.1", handle)
    began = time.monotonic()
    with pytest.raises(WireError, match=r"did not answer TaskTaken within 0\.1 s") as error:
        await wire.ask("d.1", TAKEN, 0.1)
    assert not isinstance(error.value, Unreachable)
    assert time.monotonic() - began < 2


async def test_a_handlers_defect_is_no_death_either(wire, caplog):
    async def handle(_):
        raise ValueError("a defect")

    await wire.serve("d.1", handle)
    with pytest.raises(WireError, match="failed to answer TaskTaken: a defect") as error:
        await wire.ask("d.1", TAKEN, 5)
    assert not isinstance(error.value, Unreachable)


async def test_an_address_is_served_once(wire):
    async def handle(_):
        return Noted()

    await wire.serve("d.1", handle)
    with pytest.raises(ValueError, match="already"):
        await wire.serve("d.1", handle)


async def test_both_sides_talk_over_the_runtime():
    async with LocalRuntime() as runtime, House(prefill=2, wire=RuntimeWire(runtime, "test")) as house:
        for i in range(4):
            request = ask(f"r{i}")
            assert (await house.say(request))[0] == await house.expected(request)
        assert house.decoders[0].ends == {"imported": 4}
