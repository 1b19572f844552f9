"""No use of held KV reaches the end of its lease, however slow messages are and however clocks differ."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.kv.lease import DRIFT, Deadline, LeaseTerms, lease_clock
from core.kv.session import KvLedger, LeaseRefused
from core.messages import ConfigError

delays = st.floats(0.0, 60.0)


@given(
    lease=st.floats(0.5, 300.0),
    age=delays,
    there=delays,
    back=delays,
    offset=st.floats(-1e9, 1e9),
    drift=st.floats(-DRIFT / 2, DRIFT / 2),
)
def test_the_users_deadline_lies_strictly_inside_the_holders_lease(lease, age, there, back, offset, drift):
    """Times of an outside observer; the user's clock is set differently and goes faster or slower."""
    terms, ledger = LeaseTerms.of(lease), KvLedger()
    ledger.open("s", terms, 0.0)
    asked, answered = age, age + there
    try:
        seconds = ledger.claim("s", "", answered)
    except LeaseRefused:
        assert answered >= terms.usable
        return

    def users(time: float) -> float:
        return offset + time * (1 + drift)

    now = 0.0
    deadline = Deadline.granted(users(asked), seconds, lambda: users(now))
    end = (deadline.at - offset) / (1 + drift)
    assert end <= terms.usable + 1e-6 * max(1.0, abs(offset) * 1e-8)
    assert end < terms.lease
    now = answered + back
    if now >= terms.lease:
        assert deadline.passed()
        assert deadline.remaining() == 0.0


def test_a_deadline_passes_exactly_when_nothing_remains():
    now = 10.0
    deadline = Deadline.after(5.0, lambda: now)
    assert (deadline.remaining(), deadline.passed()) == (5.0, False)
    now = 15.0
    assert (deadline.remaining(), deadline.passed()) == (0.0, True)


@pytest.mark.parametrize(("lease", "guard"), [(30.0, 3.0), (1.0, 0.25), (0.4, 0.2), (100.0, 10.0)])
def test_the_guard_is_a_tenth_and_never_too_short(lease, guard):
    terms = LeaseTerms.of(lease)
    assert terms.guard == pytest.approx(guard)
    assert terms.usable == pytest.approx(lease - guard)


@pytest.mark.parametrize("lease", [0.0, -1.0, float("nan")])
def test_a_lease_that_is_none_is_refused(lease):
    with pytest.raises(ConfigError, match="must be above 0"):
        LeaseTerms.of(lease)


def test_a_guard_longer_than_half_the_lease_is_refused():
    with pytest.raises(ConfigError, match="at most half the lease"):
        LeaseTerms(lease=1.0, guard=0.6)


def test_the_clock_goes_forward():
    first = lease_clock()
    assert lease_clock() >= first
