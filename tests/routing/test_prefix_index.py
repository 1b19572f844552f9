"""The prefix index on its own: what it finds, what it refuses, how it forgets."""

import pytest

from core.kv import BlocksCleared, BlocksPlaced, BlocksRemoved, Target
from core.messages import Medium
from core.routing.index import PrefixIndex

A, B, C = (Target(name) for name in "abc")
CHAIN = list(range(1, 33))


@pytest.fixture
def index():
    made = PrefixIndex()
    yield made
    made.check_integrity()


def test_an_empty_prompt_and_an_unknown_one_hit_nothing(index):
    assert index.match([]).blocks == {}
    index.place(A, CHAIN)
    assert index.match([99, *CHAIN]).blocks == {}


def test_every_target_is_found_at_its_own_depth(index):
    index.place(A, CHAIN)
    index.place(B, CHAIN[:20])
    index.place(C, CHAIN[:1])
    assert index.match(CHAIN).blocks == {A: 32, B: 20, C: 1}
    assert index.match(CHAIN[:10]).blocks == {A: 10, B: 10, C: 1}


def test_a_prompt_that_branches_off_hits_up_to_there(index):
    index.place(A, CHAIN)
    assert index.match([*CHAIN[:7], 99, 98]).blocks == {A: 7}


def test_a_lookup_costs_far_less_than_a_step_a_block():
    """Counts what matters, look-ups in the table, rather than time, which is the machine's."""

    class Counting(dict):
        looked = 0

        def get(self, *args):
            Counting.looked += 1
            return super().get(*args)

    index = PrefixIndex()
    index._tables[0] = Counting()
    chain = list(range(1, 8193))
    index.place(A, chain)
    for number in range(30):
        index.place(Target(f"w{number}"), chain[:4000])
    Counting.looked = 0
    assert max(index.match(chain).blocks.values()) == 8192
    assert Counting.looked <= 20


def test_blocks_after_one_that_is_not_held_are_refused(index):
    index.place(A, CHAIN[:4])
    index.place(B, CHAIN[4:8], parent=CHAIN[3])
    assert index.match(CHAIN).blocks == {A: 4}
    assert index.counters.refused_unreachable == 4


def test_a_full_index_keeps_beginnings_and_takes_more_when_there_is_room():
    index = PrefixIndex(max_blocks=10)
    index.place(A, CHAIN[:8])
    index.place(B, [*CHAIN[:8], 50, 51, 52])
    assert len(index) == 10
    assert index.match([*CHAIN[:8], 50, 51, 52]).blocks == {A: 8, B: 10}
    assert index.counters.refused_full == 1
    index.place(B, [53], parent=52)
    assert index.counters.refused_unreachable == 1
    index.remove(B, [51, 50])
    index.place(C, [60, 61])
    assert index.match([60, 61]).blocks == {C: 2}
    index.check_integrity()


def test_tiers_are_told_apart(index):
    index.place(A, CHAIN[:8])
    index.place(A, CHAIN[8:12], parent=CHAIN[7], medium=Medium.HOST)
    index.place(A, CHAIN[12:14], parent=CHAIN[11], medium=Medium.DISK)
    index.place(B, CHAIN[:10])
    found = index.match(CHAIN)
    assert found.blocks == {A: 14, B: 10}
    assert found.slower == {Medium.HOST: {A: 4}, Medium.DISK: {A: 2}}
    weights = {Medium.DEVICE: 1.0, Medium.HOST: 0.75, Medium.DISK: 0.25, Medium.EXTERNAL: 0.0}
    assert found.weighted(weights) == {A: 8 + 3 + 0.5, B: 10}


def test_a_block_that_moves_is_on_one_medium(index):
    index.place(A, CHAIN[:4])
    index.place(A, CHAIN[2:4], parent=CHAIN[1], medium=Medium.HOST)
    assert index.match(CHAIN).slower == {Medium.HOST: {A: 2}}
    assert index.blocks_of(A) == 4
    index.place(A, CHAIN[2:4], parent=CHAIN[1])
    assert index.match(CHAIN).slower == {}


def test_placing_and_removing_twice_is_placing_and_removing_once(index):
    for _ in range(2):
        index.place(A, CHAIN)
    assert index.blocks_of(A) == 32
    for _ in range(2):
        index.remove(A, CHAIN[30:])
    assert index.match(CHAIN).blocks == {A: 30}
    index.remove(B, CHAIN)


def test_updates_are_carried_out_in_order(index):
    index.apply(A, [BlocksPlaced(CHAIN[:4]), BlocksRemoved(CHAIN[2:4]), BlocksCleared(), BlocksPlaced(CHAIN[:1])])
    assert index.match(CHAIN).blocks == {A: 1}


def test_a_lost_target_is_gone_at_once_and_its_memory_later(index):
    index.place(A, CHAIN)
    index.place(B, CHAIN[:16])
    index.forget(A)
    assert index.match(CHAIN).blocks == {B: 16}
    index.check_integrity()
    while index.sweep(5):
        index.check_integrity()
    assert len(index) == 16
    index.forget(A)


def test_a_target_that_comes_back_has_nothing_of_before(index):
    index.place(A, CHAIN)
    index.forget(A)
    index.place(A, CHAIN[:2])
    assert index.match(CHAIN).blocks == {A: 2}
    while index.sweep(7):
        index.check_integrity()
    assert index.match(CHAIN).blocks == {A: 2}
    assert len(index) == 2


def test_bits_are_used_again_so_that_churn_does_not_grow_the_sets(index):
    for number in range(500):
        target = Target(f"w{number}")
        index.place(target, CHAIN)
        index.forget(target)
        index.sweep(1000)
    assert len(index._by_number) <= 2


def test_sweeping_happens_along_with_other_work():
    index = PrefixIndex()
    index.place(A, list(range(1000, 3000)))
    index.forget(A)
    for number in range(40):
        index.place(B, [10_000 + number])
    assert len(index) == 40
    index.check_integrity()


def test_an_index_of_no_blocks_is_refused():
    with pytest.raises(ValueError, match="max_blocks is 0"):
        PrefixIndex(max_blocks=0)
