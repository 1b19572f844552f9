"""Any interleaving of finish, failure, abort, crash, expiry, and of lost, late and repeated messages ends well.

What is checked is in `tests/prefill/world.py`: `World.check` after every step, `World.come_to_rest` in the end.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.messages import Rendezvous
from core.prefill import decode_table as dt
from core.prefill import prefill_table as pt
from core.prefill.machine import Row, Table
from core.prefill.messages import FailureKind
from core.prefill.session import DecodeSession
from tests.prefill.world import DISTURBANCES, HARMLESS, World

WALKS = 15000


class Interleavings(RuleBasedStateMachine):
    """Hypothesis looks for the shortest way to break it."""

    world: World

    @initialize(
        kind=st.sampled_from(list(Rendezvous)), fallback=st.booleans(), tries=st.integers(1, 3), head=st.integers(0, 14)
    )
    def begin(self, kind, fallback, tries, head):
        self.world = World(kind, fallback=fallback, max_attempts=tries, head=head)

    @rule(data=st.data(), steps=st.integers(1, 5))
    def things_go_on(self, data, steps):
        for _ in range(steps):
            if moves := self.world.moves():
                self.world.move(*data.draw(st.sampled_from(moves)))

    @rule(data=st.data(), what=st.sampled_from(DISTURBANCES))
    def something_goes_wrong(self, data, what):
        self.world.disturb(what, lambda choices: data.draw(st.sampled_from(choices)))

    @invariant()
    def all_is_well(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.come_to_rest()


Interleavings.TestCase.settings = settings(
    max_examples=200, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_interleaving_ends_well = Interleavings.TestCase


@pytest.fixture
def rows_taken(monkeypatch):
    """Which rows of both tables were used, as they are."""
    taken: set[Row] = set()
    find = Table.find

    def remember(self, state, event, facts):
        row = find(self, state, event, facts)
        taken.add(row)
        return row

    monkeypatch.setattr(Table, "find", remember)
    return taken


@pytest.mark.parametrize("state", [dt.S.PREFILLING, dt.S.CLAIMING, dt.S.IMPORTING, dt.S.DECODING])
@pytest.mark.parametrize("event", [dt.E.READY, dt.E.TICKET_REFUSED])
def test_an_earlier_worker_that_comes_late_is_let_go(state, event):
    session = _late_worker(state)
    assert session.state is state
    assert session.step(event, "early") == [(dt.A.LET_GO, "early")]
    assert session.state is state


def _late_worker(state: dt.S) -> DecodeSession:
    session = DecodeSession()
    for happened in (dt.E.START, dt.E.RESERVED, dt.E.SUBMITTED):
        session.step(happened)
    for delivery, attempt in enumerate(("early", "current"), 1):
        session.step(dt.E.TAKEN, attempt, Rendezvous.PULL, delivery=delivery)
    if state is not dt.S.PREFILLING:
        session.step(dt.E.READY, "current")
    for to, happened in ((dt.S.IMPORTING, dt.E.CLAIMED), (dt.S.DECODING, dt.E.IMPORTED)):
        if state in (to, dt.S.DECODING):
            session.step(happened, "current")
    return session


def test_the_queues_verdict_on_a_handshake_that_is_to_be_tried_again():
    session = _failed_handshake()
    steps = session.step(dt.E.FAILED, "", failure=FailureKind.ABANDONED)
    assert [step.action for step in steps] == [dt.A.DISARM, dt.A.DECODE_LOCALLY]


def _failed_handshake() -> DecodeSession:
    session = DecodeSession()
    for happened in (dt.E.START, dt.E.RESERVED, dt.E.SUBMITTED):
        session.step(happened)
    session.step(dt.E.TAKEN, "a", Rendezvous.HANDSHAKE, delivery=1)
    session.step(dt.E.READY, "a")
    session.step(dt.E.FAILED, "a", failure=FailureKind.RETRYABLE)
    assert session.state is dt.S.RENEWING
    return session


def test_random_walks_end_well_and_take_every_transition(rows_taken):
    """Many more walks than Hypothesis has time for, so that no transition is written down that nothing has tried."""
    for event in (dt.E.READY, dt.E.TICKET_REFUSED):  # rarer than all others
        for state in (dt.S.PREFILLING, dt.S.CLAIMING):
            _late_worker(state).step(event, "early")
    _failed_handshake().step(dt.E.FAILED, "", failure=FailureKind.ABANDONED)
    dice = random.Random(20)
    for walk in range(WALKS):
        kind = list(Rendezvous)[walk % 3]
        world = World(kind, fallback=dice.random() < 0.7, max_attempts=dice.randint(1, 3), head=dice.randint(0, 14))
        disturbances = HARMLESS if walk % 2 else DISTURBANCES
        for _ in range(dice.randint(1, 25)):
            if dice.random() < 0.6 and (moves := world.moves()):
                world.move(*dice.choice(moves))
            else:
                world.disturb(dice.choice(disturbances), dice.choice)
            world.check()
        world.come_to_rest()
    missed = [row for table in (dt.TABLE, pt.TABLE) for row in table.rows if row not in rows_taken]
    assert missed == [], "\n".join(map(str, missed))
