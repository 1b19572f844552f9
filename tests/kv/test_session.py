"""The ledger of KV sessions: one end each, whatever happens."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.kv import session as module
from core.kv.lease import LeaseTerms
from core.kv.session import KvLedger, KvSessions, LeaseRefused, Outcome
from core.messages import EngineDead

TERMS = LeaseTerms(lease=10.0, guard=1.0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Engine:
    def __init__(self, *errors: Exception) -> None:
        self.freed: list[str] = []
        self.errors = list(errors)

    async def release(self, name: str) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.freed.append(name)


async def test_each_way_to_end_is_counted_and_frees_once():
    engine = Engine()
    async with KvSessions(engine.release) as sessions:
        for name in "abc":
            sessions.open(name, TERMS)
        assert sessions.settle("a", Outcome.IMPORTED)
        assert not sessions.settle("a", Outcome.RELEASED)
        assert sessions.settle("b", Outcome.RELEASED)
        assert not sessions.settle("never opened", Outcome.RELEASED)
        await sessions.freed()
        counts = sessions.counts()
        assert (counts.opened, counts.imported, counts.released, counts.expired, counts.live) == (3, 1, 1, 0, 1)
        sessions.check_integrity()
    assert sorted(engine.freed) == ["a", "b", "c"]
    assert sessions.counts().released == 2


async def test_a_lease_that_nobody_settles_ends_by_itself():
    engine, heard = Engine(), []
    async with KvSessions(engine.release, on_expired=heard.append) as sessions:
        sessions.open("late", LeaseTerms.of(0.2))
        sessions.open("early", LeaseTerms.of(0.1))
        sessions.open("kept", TERMS)
        async with asyncio.timeout(5):
            while len(engine.freed) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert heard == engine.freed == ["early", "late"]
        counts = sessions.counts()
        assert (counts.expired, counts.live) == (2, 1)
        assert not sessions.settle("late", Outcome.IMPORTED)


async def test_a_claim_is_told_the_time_up_to_the_guard_and_refused_within_it():
    clock = Clock()
    async with KvSessions(Engine().release, clock=clock) as sessions:
        sessions.open("s", TERMS, nonce="n")
        clock.now = 2.0
        assert sessions.claim("s", "n") == 7.0
        with pytest.raises(LeaseRefused, match="another ticket"):
            sessions.claim("s", "m")
        clock.now = 9.0
        with pytest.raises(LeaseRefused, match=r"over in 1\.000 s, too soon.*raise kv-lease"):
            sessions.claim("s", "n")
        sessions.settle("s", Outcome.IMPORTED)
        with pytest.raises(LeaseRefused, match="is not held here"):
            sessions.claim("s", "n")


async def test_one_name_is_not_held_twice():
    async with KvSessions(Engine().release) as sessions:
        sessions.open("s", TERMS)
        with pytest.raises(ValueError, match="held already"):
            sessions.open("s", TERMS)


async def test_a_room_is_not_freed_under_its_writer():
    engine = Engine()
    async with KvSessions(engine.release) as sessions:
        sessions.open("room", TERMS)
        assert sessions.expose("room") <= TERMS.usable
        with pytest.raises(LeaseRefused, match="takes no writer"):
            sessions.expose("room")
        assert not sessions.settle("room", Outcome.RELEASED)
        assert sessions.counts().retired == 1
        await sessions.freed()
        assert engine.freed == []
        with pytest.raises(LeaseRefused):
            sessions.claim("room", "")
        sessions.conceal("room")
        await sessions.freed()
        assert engine.freed == ["room"]
        assert sessions.counts().released == 1


async def test_a_room_whose_writer_says_nothing_is_freed_when_the_lease_ends():
    engine = Engine()
    async with KvSessions(engine.release) as sessions:
        sessions.open("room", LeaseTerms.of(0.1))
        sessions.expose("room")
        sessions.settle("room", Outcome.RELEASED)
        async with asyncio.timeout(5):
            while not engine.freed:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert sessions.counts().released == 1
        assert sessions.counts().expired == 0


async def test_a_room_that_was_written_can_be_written_again_by_another():
    async with KvSessions(Engine().release) as sessions:
        sessions.open("room", TERMS)
        sessions.expose("room")
        sessions.conceal("room")
        sessions.expose("room")


async def test_handing_over_leaves_the_blocks_to_decode():
    engine = Engine()
    async with KvSessions(engine.release) as sessions:
        sessions.open("room", TERMS)
        assert sessions.hand_over("room")
        assert not sessions.hand_over("room")
        await sessions.freed()
        assert engine.freed == []
        sessions.free("room")
        await sessions.freed()
        assert engine.freed == ["room"]
        assert sessions.counts().imported == 1


async def test_an_engine_that_does_not_free_at_once_is_asked_again(monkeypatch, caplog):
    monkeypatch.setattr(module, "FREE_RETRIES", (0.0, 0.0))
    engine = Engine(RuntimeError("not now"))
    async with KvSessions(engine.release) as sessions:
        sessions.open("s", TERMS)
        sessions.settle("s", Outcome.IMPORTED)
        await sessions.freed()
        assert engine.freed == ["s"]
        sessions.check_integrity()
    assert "release_kv raised for KV session 's'" in caplog.text


async def test_an_engine_that_never_frees_is_found_out(monkeypatch):
    monkeypatch.setattr(module, "FREE_RETRIES", (0.0,))
    async with KvSessions(Engine(*[RuntimeError("never")] * 9).release) as sessions:
        sessions.open("s", TERMS)
        sessions.settle("s", Outcome.IMPORTED)
        await sessions.freed()
        assert sessions.counts().stuck == 1
        with pytest.raises(AssertionError, match=r"does not free KV sessions \['s'\]; restart"):
            sessions.check_integrity()


async def test_what_a_dead_engine_held_is_gone():
    async with KvSessions(Engine(EngineDead("gone")).release) as sessions:
        sessions.open("s", TERMS)
        sessions.settle("s", Outcome.RELEASED)
        await sessions.freed()
        sessions.check_integrity()


async def test_closing_ends_every_task_and_frees_everything_even_if_exposed():
    engine = Engine()
    sessions = KvSessions(engine.release)
    sessions.open("a", TERMS)
    sessions.open("b", TERMS)
    sessions.expose("b")
    await sessions.close()
    await sessions.close()
    assert sorted(engine.freed) == ["a", "b"]
    assert sessions.live == frozenset()
    assert [task for task in asyncio.all_tasks() if "kv" in task.get_name()] == []


async def test_an_engine_that_hangs_does_not_keep_the_worker_from_closing(monkeypatch, caplog):
    monkeypatch.setattr(module, "CLOSE_TIMEOUT", 0.05)

    async def hang(_: str) -> None:
        await asyncio.Event().wait()

    sessions = KvSessions(hang)
    sessions.open("a", TERMS)
    await sessions.close()
    assert "did not end within" in caplog.text


class AnyLedger(RuleBasedStateMachine):
    """The ledger against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = KvLedger()
        self.now = 0.0
        self.live: dict[str, float] = {}
        self.exposed: set[str] = set()
        self.retired: set[str] = set()
        self.ended = 0
        self.opened = 0

    names = st.sampled_from("abcd")

    def end(self, name: str) -> None:
        del self.live[name]
        self.exposed.discard(name)
        self.retired.discard(name)
        self.ended += 1

    @rule(name=names, lease=st.floats(0.5, 20.0))
    def open(self, name, lease):
        if name not in self.live:
            self.ledger.open(name, LeaseTerms.of(lease), self.now)
            self.live[name] = self.now + lease
            self.opened += 1

    @rule(name=names, outcome=st.sampled_from([Outcome.IMPORTED, Outcome.RELEASED]))
    def settle(self, name, outcome):
        ended = self.ledger.settle(name, outcome)
        if name in self.live and name in self.exposed and outcome is Outcome.RELEASED:
            assert not ended
            self.retired.add(name)
        else:
            assert ended == (name in self.live)
            if ended:
                self.end(name)

    @rule(name=names)
    def expose(self, name):
        try:
            seconds = self.ledger.expose(name, self.now)
        except LeaseRefused:
            return
        assert name in self.live
        assert name not in self.exposed
        assert self.now + seconds < self.live[name]
        self.exposed.add(name)

    @rule(name=names)
    def conceal(self, name):
        ended = self.ledger.conceal(name) is not None
        assert ended == (name in self.retired)
        self.exposed.discard(name)
        if ended:
            self.end(name)

    @rule(name=names)
    def claim(self, name):
        try:
            seconds = self.ledger.claim(name, "", self.now)
        except LeaseRefused:
            return
        assert name not in self.retired
        assert 0 < seconds < self.live[name] - self.now

    @rule(seconds=st.floats(0.0, 8.0))
    def wait(self, seconds):
        self.now += seconds
        ended = {name for name, _ in self.ledger.expire(self.now)}
        assert ended == {name for name, until in self.live.items() if until <= self.now}
        for name in ended:
            self.end(name)

    @invariant()
    def books_agree(self):
        self.ledger.check_integrity()
        counts = self.ledger.counts()
        assert counts.opened == self.opened == self.ended + len(self.live)
        assert counts.opened == counts.imported + counts.released + counts.expired + counts.live
        assert self.ledger.live == self.live.keys()
        assert counts.retired == len(self.retired)
        upcoming = self.ledger.next_expiry()
        assert upcoming == (min(self.live.values()) if self.live else None)


AnyLedger.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_any_ledger = AnyLedger.TestCase
