"""Claims on blocks and grants to peers: the books that keep a transfer from meeting a reused block."""

from __future__ import annotations

import threading

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.kv.transfer import Access, TransferLate, TransferRefused
from core.kv.transfer.grants import Grants
from core.kv.transfer.inflight import InFlight


class Claims(RuleBasedStateMachine):
    """Any order of transfers and frees: a block is given back exactly once, and never while it is claimed."""

    def __init__(self):
        super().__init__()
        self.inflight = InFlight(lambda free: free())
        self.holds = []
        self.allocated = set(range(8))
        self.freed = []

    @rule(blocks=st.sets(st.integers(0, 7), min_size=1))
    def start(self, blocks):
        blocks &= self.allocated
        self.holds.append((self.inflight.hold(blocks), blocks))

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def settle(self, data):
        hold, _ = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        hold.release()
        hold.release()

    @rule(blocks=st.sets(st.integers(0, 7), min_size=1))
    def free(self, blocks):
        blocks &= self.allocated
        self.allocated -= blocks
        self.inflight.free_when_idle(blocks, self.take)

    def take(self, blocks):
        claimed = set().union(*(held for _, held in self.holds), set())
        assert not claimed & set(blocks)
        self.freed += blocks
        self.allocated |= set(blocks)

    @invariant()
    def books_agree(self):
        self.inflight.check_integrity()
        assert self.inflight.blocks == frozenset().union(*(held for _, held in self.holds), frozenset())
        # What was freed and is not back yet is claimed: nothing is forgotten.
        assert set(range(8)) - self.allocated <= self.inflight.blocks
        assert self.inflight.waiting == 8 - len(self.allocated)


TestClaims = Claims.TestCase


def test_a_second_free_of_a_waiting_block_is_an_error():
    inflight = InFlight(lambda free: free())
    hold = inflight.hold([1])
    inflight.free_when_idle([1], lambda _: None)
    with pytest.raises(ValueError, match="freed twice"):
        inflight.free_when_idle([1], lambda _: None)
    hold.release()


def test_postponed_frees_are_delivered_where_the_allocator_lives():
    queue = []
    inflight = InFlight(queue.append)
    hold = inflight.hold([1, 2])
    freed = []
    inflight.free_when_idle([1, 2, 3], freed.extend)
    assert freed == [3]
    thread = threading.Thread(target=hold.release)
    thread.start()
    thread.join()
    assert freed == [3]
    for free in queue:
        free()
    assert sorted(freed) == [1, 2, 3]


def test_grants_end_by_this_sides_clock_alone():
    now = [100.0]
    grants = Grants(lambda: now[0])
    grants.grant("s", [1, 2], Access.READ, 10)
    assert grants.require("s", [2], Access.READ) == 10
    now[0] = 110
    with pytest.raises(TransferLate, match=r"ended 0.000 s ago"):
        grants.require("s", [2], Access.READ)
    grants.grant("s", [1, 2], Access.READ, 10)
    assert grants.require("s", [1], Access.READ) == 10
    now[0] = 121
    assert grants.expire() == ["s"]
    with pytest.raises(TransferRefused, match="not held here"):
        grants.require("s", [1], Access.READ)
    with pytest.raises(ValueError, match="must be positive"):
        grants.grant("s", [1], Access.READ, 0)
