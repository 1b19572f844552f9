"""Engine events become closed, counted, engine-independent updates."""

import pytest

from core.kv import BlocksCleared, BlocksPlaced, BlocksRemoved, KvNormalizer, prompt_hashes
from core.messages import KvCleared, KvRemoved, KvStored, Medium

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
A, B, C, D = prompt_hashes(PROMPT, 2)


def stored(engine_hashes, tokens, parent=None, **fields):
    return KvStored(engine_hashes, parent, tokens, 2, **fields)


def whole(**fields):
    return stored([-10, 2**64 - 1, 30, 40], PROMPT, **fields)


@pytest.fixture
def normalizer():
    made = KvNormalizer(2)
    yield made
    made.check_integrity()


def test_blocks_get_the_hashes_of_the_core(normalizer):
    assert normalizer.apply([whole()]) == [BlocksPlaced([A, B, C, D])]
    assert len(normalizer) == 4


def test_blocks_that_follow_known_ones_continue_the_chain(normalizer):
    normalizer.apply([stored([10, 20], PROMPT[:4])])
    assert normalizer.apply([stored([30, 40], PROMPT[4:], parent=20)]) == [BlocksPlaced([C, D], B)]


def test_adapter_and_salt_make_another_chain(normalizer):
    [placed] = normalizer.apply([whole(lora="french", cache_salt="tenant")])
    assert placed.hashes == prompt_hashes(PROMPT, 2, lora="french", cache_salt="tenant")


def test_a_block_stored_three_times_goes_with_the_third_removal(normalizer):
    normalizer.apply([whole()])
    assert normalizer.apply([whole(), whole()]) == []
    assert normalizer.apply([KvRemoved([40])]) == []
    assert normalizer.apply([KvRemoved([40])]) == []
    assert normalizer.apply([KvRemoved([40])]) == [BlocksRemoved([D])]
    assert normalizer.counters.unknown_removals == 0


def test_two_engine_hashes_of_the_same_tokens_are_one_block(normalizer):
    normalizer.apply([stored([10], [1, 2])])
    assert normalizer.apply([stored([11], [1, 2])]) == []
    assert normalizer.apply([KvRemoved([10])]) == []
    assert normalizer.apply([KvRemoved([11])]) == [BlocksRemoved([A])]


def test_what_follows_an_evicted_block_is_withdrawn_and_comes_back_with_it(normalizer):
    normalizer.apply([whole()])
    [removed] = normalizer.apply([KvRemoved([2**64 - 1])])
    assert sorted(removed.hashes) == sorted([B, C, D])
    assert len(normalizer) == 3
    assert normalizer.apply([stored([2**64 - 1], PROMPT[2:4], parent=-10)]) == [BlocksPlaced([B, C, D], A)]


def test_steps_that_cancel_out_are_not_seen(normalizer):
    normalizer.apply([whole()])
    assert normalizer.apply([KvRemoved([30]), stored([30], PROMPT[4:6], parent=2**64 - 1)]) == []


def test_a_block_counts_at_the_slowest_medium_on_its_way(normalizer):
    normalizer.apply([whole()])
    normalizer.apply([stored([2**64 - 1], PROMPT[2:4], parent=-10, medium=Medium.HOST)])
    assert normalizer.apply([KvRemoved([2**64 - 1])]) == [BlocksPlaced([B, C, D], A, Medium.HOST)]
    assert normalizer.apply([stored([2**64 - 1], PROMPT[2:4], parent=-10)]) == [BlocksPlaced([B, C, D], A)]
    assert normalizer.apply([KvRemoved([2**64 - 1], Medium.HOST)]) == []


def test_removal_from_a_medium_leaves_the_others(normalizer):
    normalizer.apply([whole(), whole(medium=Medium.DISK)])
    assert normalizer.apply([KvRemoved([40])]) == [BlocksPlaced([D], C, Medium.DISK)]
    assert normalizer.apply([KvRemoved([40], Medium.DISK)]) == [BlocksRemoved([D])]


def test_cleared_forgets_everything(normalizer):
    normalizer.apply([whole()])
    assert normalizer.apply([KvCleared()]) == [BlocksCleared()]
    assert len(normalizer) == 0
    assert normalizer.apply([KvCleared(), stored([1], [1, 2])]) == [BlocksCleared(), BlocksPlaced([A])]


def test_blocks_after_an_unknown_one_are_left_out_and_counted(normalizer):
    assert normalizer.apply([stored([30, 40], PROMPT[4:], parent=99)]) == []
    assert normalizer.counters.orphaned == 2


@pytest.mark.parametrize(
    "event",
    [
        KvStored([1, 2], None, [1, 2, 3], 2),
        KvStored([1], None, [1, 2, 3, 4], 4),
        KvStored([1, 2], None, [1, 2], 2),
    ],
    ids=["truncated tokens", "other block size", "truncated hashes"],
)
def test_truncated_events_are_left_out_and_counted(normalizer, event):
    assert normalizer.apply([event]) == []
    assert normalizer.counters.malformed == 1


def test_an_engine_hash_that_changes_its_tokens_is_not_believed(normalizer):
    normalizer.apply([stored([10], [1, 2])])
    assert normalizer.apply([stored([10, 11], [9, 9, 8, 8])]) == []
    assert normalizer.counters.conflicting == 1


def test_removals_of_unknown_blocks_are_counted(normalizer):
    normalizer.apply([whole()])
    assert normalizer.apply([KvRemoved([77]), KvRemoved([40], Medium.HOST)]) == []
    assert normalizer.counters.unknown_removals == 2


def test_a_snapshot_rebuilds_the_same_cache(normalizer):
    normalizer.apply([whole(), stored([50, 60], [7, 7, 8, 8], parent=2**64 - 1), stored([70], [0, 0])])
    normalizer.apply([stored([40], PROMPT[6:], parent=30, medium=Medium.HOST), KvRemoved([40])])
    announced = {}
    for run in normalizer.snapshot():
        assert run.parent is None or run.parent in announced
        announced |= dict.fromkeys(run.hashes, run.medium)
    fork = prompt_hashes([1, 2, 3, 4, 7, 7, 8, 8], 2)[2:]
    expected = {A, B, C, *fork, *prompt_hashes([0, 0], 2)}
    assert announced == {**dict.fromkeys(expected, Medium.DEVICE), D: Medium.HOST}
