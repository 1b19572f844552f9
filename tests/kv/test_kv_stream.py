"""From a worker's source to a router's follower over a channel that loses, repeats and reorders."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.kv import BlocksCleared, BlocksPlaced, KvEventSource, KvFollower, KvReplayRequest, Target
from core.kv import source as source_module
from core.kv.follower import HELD_BATCHES, RETRY_SECONDS
from core.messages import KvCleared, KvEventBatch, KvRemoved, KvStored

WORKER = Target("worker-0")


class Mirror:
    """A sink that keeps what is announced."""

    def __init__(self):
        self.held = {}

    def apply(self, target, updates):
        held = self.held.setdefault(target, {})
        for update in updates:
            if isinstance(update, BlocksPlaced):
                assert update.parent is None or update.parent in held
                held.update(dict.fromkeys(update.hashes, update.medium))
            elif isinstance(update, BlocksCleared):
                held.clear()
            else:
                for block in update.hashes:
                    del held[block]

    def forget(self, target):
        self.held.pop(target, None)


class Router:
    """A follower whose requests pile up until they are answered, with a clock that is turned by hand."""

    def __init__(self):
        self.mirror = Mirror()
        self.asked = []
        self.now = 0.0
        self.follower = KvFollower(
            self.mirror, self.asked.append, clock=lambda: self.now, wall_clock=lambda: 1000.0 + self.now
        )
        self.follower.follow(WORKER)

    def answer(self, source):
        while self.asked:
            for message in source.answer(self.asked.pop(0)):
                self.follower.offer(message)
        self.follower.check_integrity()

    @property
    def held(self):
        return self.mirror.held.get(WORKER, {})


def engine_batch(sequence, *blocks, rank=0):
    """One block of one token each, whose engine hash is the token."""
    return KvEventBatch(sequence, [KvStored([b], None, [b], 1) for b in blocks], rank)


def truth(source):
    return {block: run.medium for run in source.normalizer().snapshot() for block in run.hashes}


@pytest.fixture
def source():
    made = KvEventSource(WORKER.worker, 1, epoch=7, clock=lambda: 999.5)
    yield made
    made.check_integrity()


@pytest.fixture
def router(source):
    made = Router()
    made.answer(source)
    return made


def test_a_stream_is_followed_from_its_beginning(source, router):
    for number in range(3):
        for batch in source.ingest(engine_batch(number, number)):
            router.follower.offer(batch)
    assert router.held == truth(source)
    assert router.follower.synced(WORKER)
    assert router.follower.lag(WORKER) == 0.5


def test_a_router_that_comes_late_gets_a_snapshot(source):
    for number in range(5):
        source.ingest(engine_batch(number, number))
    router = Router()
    assert router.asked == [KvReplayRequest(worker="worker-0", sequence=0)]
    router.answer(source)
    assert router.held == truth(source)
    assert len(router.held) == 5
    assert router.follower.counters.snapshots == 1


def test_batches_that_overtake_the_snapshot_are_kept(source):
    router = Router()
    [request] = router.asked
    first = source.ingest(engine_batch(0, 1))
    snapshot = source.answer(request)
    second = source.ingest(engine_batch(1, 2))
    for message in [*second, *snapshot, *first]:
        router.follower.offer(message)
    assert router.held == truth(source)
    assert router.follower.synced(WORKER)


def test_a_gap_is_noticed_and_replayed(source, router):
    batches = [batch for number in range(4) for batch in source.ingest(engine_batch(number, number))]
    router.follower.offer(batches[0])
    router.follower.offer(batches[3])
    assert not router.follower.synced(WORKER)
    assert router.asked == [KvReplayRequest(worker="worker-0", epoch=7, sequence=1)]
    router.answer(source)
    assert router.held == truth(source)
    assert router.follower.counters.gaps == 1
    assert router.follower.counters.snapshots == 1  # the first one, none for the gap


def test_a_gap_that_is_too_old_is_filled_with_a_snapshot(source, router, monkeypatch):
    monkeypatch.setattr(source_module, "REPLAY_BATCHES", 2)
    source = KvEventSource(WORKER.worker, 1, epoch=8)
    batches = [batch for number in range(6) for batch in source.ingest(engine_batch(number, number))]
    router.follower.offer(batches[5])
    router.answer(source)
    assert router.held == truth(source)
    assert router.follower.counters.snapshots == 2


def test_a_lost_last_batch_shows_with_the_next_heartbeat(source, router):
    source.ingest(engine_batch(0, 1))
    router.follower.offer(source.heartbeat())
    router.answer(source)
    assert router.held == truth(source)


def test_a_request_that_is_not_answered_is_made_again(source, router):
    source.ingest(engine_batch(0, 1))
    router.follower.offer(source.heartbeat())
    assert len(router.asked) == 1
    router.now += RETRY_SECONDS / 2
    router.follower.tick()
    assert len(router.asked) == 1
    router.now += RETRY_SECONDS
    router.follower.tick()
    assert len(router.asked) == 2


def test_duplicates_change_nothing(source, router):
    batches = source.ingest(engine_batch(0, 1)) + source.ingest(engine_batch(1, 2))
    for batch in batches * 3:
        router.follower.offer(batch)
    assert router.held == truth(source)
    assert router.follower.counters.duplicates == 4


def test_a_restarted_worker_begins_anew_and_its_past_is_void(source, router):
    old = source.ingest(engine_batch(0, 1)) + source.ingest(engine_batch(1, 2))
    router.follower.offer(old[0])
    again = KvEventSource(WORKER.worker, 1, epoch=8)
    for batch in again.ingest(engine_batch(0, 5)):
        router.follower.offer(batch)
    router.follower.offer(old[1])
    assert router.held == truth(again)
    assert router.follower.counters.stale == 1


def test_a_restart_whose_first_batch_was_lost_is_a_gap(source, router):
    router.follower.offer(source.ingest(engine_batch(0, 1))[0])
    again = KvEventSource(WORKER.worker, 1, epoch=8)
    again.ingest(engine_batch(0, 5))
    router.follower.offer(again.ingest(engine_batch(1, 6))[0])
    assert router.held == {}
    router.answer(again)
    assert router.held == truth(again)


def test_events_of_workers_that_are_not_followed_are_counted(source, router):
    other = KvEventSource("stranger", 1)
    router.follower.offer(other.ingest(engine_batch(0, 1))[0])
    assert router.follower.counters.unknown == 1
    assert Target("stranger") not in router.mirror.held


def test_a_lost_worker_is_forgotten_at_once(source, router):
    batch = source.ingest(engine_batch(0, 1))[0]
    router.follower.offer(batch)
    router.follower.unfollow(WORKER)
    router.follower.offer(batch)
    assert router.mirror.held == {}


def test_truncated_bytes_are_counted_and_replayed(source, router):
    encoded = [
        msgspec.msgpack.encode(batch) for number in range(3) for batch in source.ingest(engine_batch(number, number))
    ]
    router.follower.offer_encoded(encoded[0])
    router.follower.offer_encoded(encoded[1][:-4])
    router.follower.offer_encoded(b"")
    router.follower.offer_encoded(encoded[2])
    assert router.follower.counters.undecodable == 2
    router.answer(source)
    assert router.held == truth(source)


def test_a_flood_behind_a_gap_is_given_up_for_a_snapshot(source, router):
    batches = [batch for n in range(HELD_BATCHES + 3) for batch in source.ingest(engine_batch(n, n))]
    for batch in batches[1:]:
        router.follower.offer(batch)
    router.answer(source)
    assert router.held == truth(source)
    assert router.follower.synced(WORKER)


def test_large_snapshots_come_in_parts_and_in_any_order(router, monkeypatch):
    monkeypatch.setattr(source_module, "MESSAGE_BYTES", 95)
    source = KvEventSource(WORKER.worker, 1, epoch=8)
    source.ingest(KvEventBatch(0, [KvStored(list(range(10)), None, list(range(10)), 1)]))
    parts = source.snapshot()
    assert [sum(len(run.hashes) for run in part.updates) for part in parts] == [3, 3, 3, 1]
    for part in [*parts[::-1], parts[2]]:
        router.follower.offer(part)
    assert router.held == truth(source)


@pytest.mark.parametrize("chained", [True, False], ids=["one long run", "runs of one block"])
def test_no_message_is_too_long_for_the_transport(router, chained):
    """NATS takes 1 MiB. Snapshots, and batches that a single eviction at the root makes huge, stay below it."""
    count = 130_000
    hashes = list(range(2**63, 2**63 + count))
    events = [KvStored(hashes, None, hashes_to_tokens(hashes), 1)] if chained else []
    if not chained:
        events = [KvStored([h], None, hashes_to_tokens([h]), 1) for h in hashes]
    source = KvEventSource(WORKER.worker, 1, epoch=8)
    batches = source.ingest(KvEventBatch(0, events))
    batches += source.ingest(KvEventBatch(1, [KvRemoved(hashes[:1] if chained else hashes)]))
    source.ingest(KvEventBatch(2, events[:1]))
    messages = [*batches, *source.snapshot()]
    assert max(len(msgspec.msgpack.encode(message)) for message in messages) < 2**20
    for batch in batches:
        router.follower.offer(batch)
    assert router.held == {}
    router.answer(source)
    router.follower.offer(source.heartbeat())
    router.answer(source)
    assert router.held == truth(source)


def hashes_to_tokens(hashes):
    return [h & 0xFFFFFFFF for h in hashes]


def test_ranks_have_streams_of_their_own(source):
    router = Router()
    router.follower.follow(Target("worker-0", 1))
    for batch in [engine_batch(0, 1), engine_batch(0, 2, rank=1), engine_batch(1, 3)]:
        for message in source.ingest(batch):
            router.follower.offer(message)
    assert len(router.mirror.held[WORKER]) == 2
    assert len(router.mirror.held[Target("worker-0", 1)]) == 1
    assert source.ranks == (0, 1)


def test_engine_batches_are_put_in_order_and_counted_once(source):
    assert source.ingest(engine_batch(1, 2)) == []
    assert [batch.sequence for batch in source.ingest(engine_batch(0, 1))] == [0, 1]
    assert source.ingest(engine_batch(0, 9)) == []


def test_an_engine_batch_that_never_comes_is_given_up(source):
    source.ingest(engine_batch(0, 1))
    published = []
    for number in range(2, 2 + source_module.REORDER_WINDOW + 1):
        published += source.ingest(engine_batch(number, number + 10))
    assert source.lost_batches == 1
    assert len(published) == source_module.REORDER_WINDOW + 1


def test_what_changes_nothing_is_not_published(source):
    source.ingest(engine_batch(0, 1))
    assert source.ingest(engine_batch(1, 1)) == []
    assert source.ingest(KvEventBatch(2, [KvRemoved([1])])) == []


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 60))
def test_whatever_the_channel_does_the_router_ends_with_the_truth(rng: random.Random, steps: int):
    """Loss, repetition, reordering, restarts and clears; then one heartbeat gets through, and requests are answered."""
    epoch, number = 1, 0
    source = KvEventSource(WORKER.worker, 1, epoch=epoch)
    router = Router()
    channel = []
    for _ in range(steps):
        action = rng.random()
        if action < 0.05:
            epoch, number = epoch + 1, 0
            source = KvEventSource(WORKER.worker, 1, epoch=epoch)
        elif action < 0.65:
            block = rng.randrange(8)
            event = rng.choice([KvStored([block], None, [block], 1), KvRemoved([block]), KvCleared()])
            channel += source.ingest(KvEventBatch(number, [event]))
            number += 1
        elif channel:
            message = channel[rng.randrange(len(channel))]
            if rng.random() < 0.8:
                channel.remove(message)
            if rng.random() < 0.7:
                router.follower.offer(message)
        elif router.asked and rng.random() < 0.5:
            channel += source.answer(router.asked.pop(0))
        router.follower.check_integrity()
    router.follower.offer(source.heartbeat())
    for _ in range(4):
        router.now += 2 * RETRY_SECONDS
        router.follower.tick()
        router.answer(source)
    assert router.held == truth(source)
    assert router.follower.synced(WORKER)
