"""Load: what was sent, what others sent, what workers report."""

import pytest

from core.kv import Target
from core.messages import Load
from core.routing.load import PEER_SECONDS, RESIDENT_WEIGHT, Capacity, LoadTracker, TargetLoad

A, B = Target("a"), Target("b")
CAPACITY = Capacity(block_size=16, num_kv_blocks=100, max_num_batched_tokens=1000, max_num_seqs=4)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tracker(clock):
    made = LoadTracker("me", clock=clock)
    made.add(A, CAPACITY)
    made.add(B, CAPACITY)
    yield made
    made.check_integrity()


def report(**fields):
    return Load(**{"running": 0, "waiting": 0, "kv_blocks_used": 0, "kv_blocks_total": 100, **fields})


def test_a_request_counts_from_dispatch_to_its_end(tracker):
    tracker.dispatch("r", A, prompt_tokens=100, hit_tokens=30)
    assert tracker.load(A) == TargetLoad(prefill_tokens=70, resident_tokens=100, requests=1)
    assert tracker.work == {A: 70 + RESIDENT_WEIGHT * 100, B: 0}
    tracker.prefilled("r")
    tracker.prefilled("r")
    assert tracker.load(A) == TargetLoad(resident_tokens=100, requests=1)
    tracker.finish("r")
    tracker.finish("r")
    assert tracker.load(A) == TargetLoad()
    assert tracker.in_flight == 0


def test_a_retry_elsewhere_moves_the_request(tracker):
    tracker.dispatch("r", A, prompt_tokens=100)
    tracker.dispatch("r", B, prompt_tokens=100)
    assert tracker.load(A) == TargetLoad()
    assert tracker.load(B).requests == 1


def test_unknown_requests_and_targets_are_left_alone(tracker):
    tracker.finish("nobody")
    tracker.prefilled("nobody")
    tracker.report(Target("gone"), report(running=3))
    tracker.dispatch("r", Target("gone"), prompt_tokens=5)
    tracker.finish("r")
    assert set(tracker.work) == {A, B}


def test_requests_of_a_target_that_left_do_not_weigh_on_its_successor(tracker):
    tracker.dispatch("r", A, prompt_tokens=100)
    tracker.remove(A)
    assert A not in tracker.work
    tracker.add(A, CAPACITY)
    assert tracker.load(A) == TargetLoad()
    tracker.dispatch("s", A, prompt_tokens=7)
    tracker.finish("r")
    assert tracker.load(A).requests == 1


def test_work_from_elsewhere_is_believed_when_the_worker_reports_it(tracker):
    tracker.report(A, report(running=2, waiting=1, kv_blocks_used=10, tokens_in_flight=500))
    assert tracker.load(A) == TargetLoad(prefill_tokens=500, resident_tokens=160, requests=3)


def test_what_a_report_knows_already_is_not_counted_twice(tracker):
    tracker.dispatch("r", A, prompt_tokens=100)
    tracker.report(A, report(running=1, kv_blocks_used=7, tokens_in_flight=100))
    assert tracker.load(A) == TargetLoad(prefill_tokens=100, resident_tokens=112, requests=1)


def test_what_was_sent_since_the_report_is_added_to_it(tracker):
    tracker.report(A, report(running=1, tokens_in_flight=500))
    tracker.dispatch("r", A, prompt_tokens=100)
    assert tracker.load(A).prefill_tokens == 600
    tracker.prefilled("r")
    assert tracker.load(A).prefill_tokens == 500
    tracker.finish("r")
    assert tracker.load(A).requests == 1


def test_what_a_report_knows_and_has_ended_since_counts_no_more(tracker):
    tracker.dispatch("r", A, prompt_tokens=100)
    tracker.report(A, report(running=3, tokens_in_flight=160))
    tracker.dispatch("s", A, prompt_tokens=10)
    assert tracker.load(A).prefill_tokens == 170
    tracker.finish("r")
    assert tracker.load(A).prefill_tokens == 70
    assert tracker.load(A).requests == 3


def test_a_burst_counts_before_any_worker_has_noticed(tracker):
    tracker.report(A, report())
    for number in range(50):
        tracker.dispatch(str(number), A, prompt_tokens=10)
    assert tracker.load(A).prefill_tokens == 500


def test_routers_see_each_others_work(tracker, clock):
    other = LoadTracker("other", clock=clock)
    other.add(A)
    other.dispatch("x", A, prompt_tokens=40)
    tracker.merge(other.share())
    assert tracker.load(A).prefill_tokens == 40
    tracker.dispatch("r", A, prompt_tokens=2)
    assert tracker.load(A).prefill_tokens == 42
    other.finish("x")
    tracker.merge(other.share())
    assert tracker.load(A).prefill_tokens == 2


def test_own_and_overtaken_reports_are_left_alone(tracker, clock):
    other = LoadTracker("other", clock=clock)
    other.add(A)
    other.dispatch("x", A, prompt_tokens=40)
    early, late = other.share(), other.share()
    tracker.merge(late)
    other.finish("x")
    tracker.merge(early)
    assert tracker.load(A).requests == 1
    tracker.dispatch("r", A, prompt_tokens=2)
    tracker.merge(tracker.share())
    assert tracker.load(A).requests == 2


def test_a_router_that_is_gone_or_silent_has_no_work(tracker, clock):
    other = LoadTracker("other", clock=clock)
    other.add(A)
    other.dispatch("x", A, prompt_tokens=40)
    tracker.merge(other.share())
    tracker.forget_router("other")
    assert tracker.load(A) == TargetLoad()
    tracker.merge(other.share())
    clock.now += PEER_SECONDS + 1
    tracker.tick()
    assert tracker.load(A) == TargetLoad()


def test_a_target_that_comes_after_its_report_has_the_others_work(tracker, clock):
    other, late = LoadTracker("other", clock=clock), Target("late")
    other.add(late)
    other.dispatch("x", late, prompt_tokens=40)
    tracker.merge(other.share())
    tracker.add(late)
    assert tracker.work[late] == 40 + RESIDENT_WEIGHT * 40


@pytest.mark.parametrize(
    ("prompts", "expected"), [([], 0.0), ([500], 0.5), ([10, 10, 10], 0.75), ([900, 900], 1.8), ([10] * 4, 1.0)]
)
def test_utilization_is_the_scarcer_of_step_and_batch(tracker, prompts, expected):
    for number, prompt in enumerate(prompts):
        tracker.dispatch(str(number), A, prompt_tokens=prompt)
    assert tracker.utilization(A) == expected


def test_a_target_of_unknown_capacity_is_never_full(tracker):
    tracker.add(Target("new"))
    tracker.dispatch("r", Target("new"), prompt_tokens=10**6)
    assert tracker.utilization(Target("new")) == 0.0
    tracker.add(Target("new"), CAPACITY)
    assert tracker.utilization(Target("new")) == 1000.0
