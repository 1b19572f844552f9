"""Routing as a whole: membership, queue, events, retries, and what can be seen of it."""

import asyncio
import random

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.kv import KvEventSource, Target
from core.messages import ConfigError, KvEventBatch, KvStored, Load, Overloaded, RequestRejected
from core.routing.config import RouterConfig
from core.routing.decision import Reason
from core.routing.load import Capacity
from core.routing.query import Query
from core.routing.registry import BUILT_IN, PolicyRegistry
from core.routing.selector import Selector

BLOCK = 16
CAPACITY = Capacity(block_size=BLOCK, num_kv_blocks=1000, max_num_batched_tokens=1024, max_num_seqs=4)


class Deployment:
    """A selector and the event sources of its workers, a function call apart."""

    def __init__(self, workers=3, **settings):
        self.now = 0.0
        self.sources = {}
        self.sent = 0
        config = RouterConfig(**{"router_seed": 1, **settings})
        self.selector = Selector(
            config,
            BLOCK,
            ask=self.answer,
            registry=PolicyRegistry([]),
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
        )
        for number in range(workers):
            self.start(f"w{number}")

    def start(self, worker):
        self.sources[worker] = KvEventSource(worker, BLOCK, clock=lambda: self.now)
        self.selector.add_worker(worker, CAPACITY)

    def answer(self, request):
        for message in self.sources[request.worker].answer(request):
            self.selector.follower.offer(message)

    def query(self, tokens, **fields):
        self.sent += 1
        return Query(f"r{self.sent}", tokens, block_size=BLOCK, **fields)

    def compute(self, worker, tokens):
        """The worker's engine caches a prompt and says so."""
        source = self.sources[worker]
        count = len(tokens) // BLOCK
        event = KvStored([hash((worker, n)) for n in range(count)], None, tokens[: count * BLOCK], BLOCK)
        for batch in source.ingest(KvEventBatch(0, [event])):
            self.selector.follower.offer(batch)


def prompt(seed, tokens=512):
    rng = random.Random(seed)
    return [rng.randrange(32_000) for _ in range(tokens)]


async def test_a_conversation_goes_back_to_the_worker_that_has_it():
    deployment = Deployment()
    first = await deployment.selector.route(deployment.query(prompt(1)))
    deployment.compute(first.target.worker, prompt(1))
    deployment.selector.prefilled(first.request_id)
    deployment.selector.finish(first.request_id)
    again = await deployment.selector.route(deployment.query([*prompt(1), *prompt(2, 40)]))
    assert (again.target, again.reason) == (first.target, Reason.HIT)
    assert deployment.selector.loads.load(again.target).prefill_tokens == 40
    deployment.selector.check_integrity()


@pytest.mark.parametrize("name", sorted(BUILT_IN))
async def test_every_policy_counts_what_it_sends(name):
    deployment = Deployment(router=name)
    decisions = [await deployment.selector.route(deployment.query(prompt(n))) for n in range(12)]
    loads = deployment.selector.loads
    assert sum(loads.load(target).requests for target in loads.targets) == loads.in_flight == 12
    for decision in decisions:
        deployment.selector.finish(decision.request_id)
    assert set(loads.work.values()) == {0}


async def test_a_worker_that_is_gone_is_never_chosen_again():
    deployment = Deployment()
    deployment.compute("w1", prompt(1))
    assert (await deployment.selector.route(deployment.query(prompt(1)))).target == Target("w1")
    deployment.selector.remove_worker("w1")
    deployment.selector.remove_worker("w1")
    assert (await deployment.selector.route(deployment.query(prompt(1)))).target != Target("w1")
    assert [w.worker for w in deployment.selector.state().workers] == ["w0", "w2"]
    deployment.selector.check_integrity()


@pytest.mark.parametrize("events", [True, False])
async def test_a_worker_that_comes_back_empty_is_not_taken_for_what_it_was(events):
    deployment = Deployment(workers=1, router_events=events)
    first = await deployment.selector.route(deployment.query(prompt(1)))
    deployment.compute("w0", prompt(1))
    deployment.selector.remove_worker("w0")
    deployment.selector.finish(first.request_id)
    deployment.start("w0")
    decision = await deployment.selector.route(deployment.query(prompt(1)))
    assert decision.hit_tokens == 0
    assert deployment.selector.loads.load(Target("w0")).requests == 1


async def test_a_worker_that_vanishes_before_the_dispatch_is_replaced_once():
    deployment = Deployment()
    deployment.compute("w1", prompt(1))
    query = deployment.query(prompt(1))
    chosen = await deployment.selector.route(query)
    other = deployment.selector.reroute(query, chosen.target)
    assert other.target != chosen.target
    assert deployment.selector.loads.load(chosen.target).requests == 0
    assert deployment.selector.loads.in_flight == 1
    with pytest.raises(Overloaded, match="went away before the request reached it"):
        deployment.selector.reroute(query, other.target)
    assert deployment.selector.loads.in_flight == 0


async def test_without_another_worker_there_is_no_second_choice():
    deployment = Deployment(workers=1)
    query = deployment.query(prompt(1))
    chosen = await deployment.selector.route(query)
    with pytest.raises(Overloaded):
        deployment.selector.reroute(query, chosen.target)
    assert deployment.selector.loads.in_flight == 0


async def test_without_workers_the_client_is_told_to_come_back():
    with pytest.raises(Overloaded, match="No worker is live") as caught:
        await Deployment(workers=0).selector.route(Query("r", [1], block_size=BLOCK))
    assert caught.value.retry_after == 5.0


async def test_ids_that_are_no_tokens_are_the_requests_fault():
    deployment = Deployment(router_queue_threshold=1.0)
    with pytest.raises(RequestRejected, match="Token 3"):
        await deployment.selector.route(deployment.query([1, 2, 3, -4] * BLOCK))
    assert deployment.selector.loads.in_flight == 0


async def test_requests_wait_while_every_worker_is_saturated():
    deployment = Deployment(workers=2, router_queue_threshold=1.0)
    selector = deployment.selector
    running = [await selector.route(deployment.query(prompt(n, 1024))) for n in range(2)]
    assert {decision.target for decision in running} == set(selector.targets)
    waiting = asyncio.create_task(selector.route(deployment.query(prompt(9))))
    await asyncio.sleep(0)
    assert selector.state().queued == 1
    selector.prefilled(running[1].request_id)
    decision = await waiting
    assert decision.target == running[1].target
    selector.check_integrity()


async def test_a_saturated_holder_is_passed_over_while_others_have_room():
    deployment = Deployment(workers=2, router_queue_threshold=1.0, load_weight=0.0)
    deployment.compute("w0", prompt(1))
    await deployment.selector.route(deployment.query([*prompt(1), *prompt(2, 1024)]))
    second = await deployment.selector.route(deployment.query([*prompt(1), *prompt(3, 1024)]))
    assert second.target == Target("w1")


async def test_a_new_worker_takes_those_who_wait():
    deployment = Deployment(workers=1, router_queue_threshold=1.0)
    await deployment.selector.route(deployment.query(prompt(0, 1024)))
    waiting = asyncio.create_task(deployment.selector.route(deployment.query(prompt(1))))
    await asyncio.sleep(0)
    deployment.start("w9")
    assert (await waiting).target == Target("w9")


async def test_the_queue_is_bounded_and_a_deadline_ends_the_wait():
    deployment = Deployment(workers=1, router_queue_threshold=1.0, router_queue_limit=1)
    selector = deployment.selector
    await selector.route(deployment.query(prompt(0, 1024)))
    waiting = asyncio.create_task(selector.route(deployment.query(prompt(1)), timeout=0.02))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="router-queue-limit"):
        await selector.route(deployment.query(prompt(2)))
    with pytest.raises(Overloaded, match="the time this request had"):
        await waiting
    assert selector.loads.in_flight == 1


async def test_a_caller_that_leaves_as_its_turn_comes_leaves_no_load_behind():
    deployment = Deployment(workers=1, router_queue_threshold=1.0)
    selector = deployment.selector
    running = await selector.route(deployment.query(prompt(0, 1024)))
    waiting = asyncio.create_task(selector.route(deployment.query(prompt(1))))
    await asyncio.sleep(0)
    selector.finish(running.request_id)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert selector.loads.in_flight == 0
    selector.check_integrity()


async def test_what_workers_report_counts():
    deployment = Deployment(workers=2)
    deployment.selector.report(
        Target("w0"),
        Load(running=3, waiting=1, kv_blocks_used=9, kv_blocks_total=1000, tokens_in_flight=900),
    )
    assert (await deployment.selector.route(deployment.query(prompt(1)))).target == Target("w1")


async def test_two_routers_do_not_pile_onto_the_same_worker():
    left, right = Deployment(workers=2), Deployment(workers=2)
    right.selector.loads.router = "other"
    first = await left.selector.route(left.query(prompt(1)))
    right.selector.merge(left.selector.loads.share())
    assert (await right.selector.route(right.query(prompt(2)))).target != first.target


async def test_a_restarted_router_knows_what_the_old_one_knew():
    deployment = Deployment()
    deployment.compute("w2", prompt(1))
    again = Deployment(workers=0)
    again.sources = deployment.sources
    for worker in deployment.sources:
        again.selector.add_worker(worker, CAPACITY)
    decision = await again.selector.route(again.query(prompt(1)))
    assert (decision.target, decision.hit_tokens) == (Target("w2"), 512)


async def test_the_state_shows_workers_load_and_index():
    deployment = Deployment()
    deployment.compute("w1", prompt(1))
    await deployment.selector.route(deployment.query(prompt(1)))
    await deployment.selector.route(deployment.query(prompt(2)))
    state = deployment.selector.state()
    assert msgspec.json.decode(msgspec.json.encode(state), type=type(state)) == state
    assert (state.policy, state.indexed_blocks, state.in_flight, state.queued) == ("kv", 32, 2, 0)
    assert state.decisions == {"hit": 1, "cold": 1}
    w1 = next(worker for worker in state.workers if worker.worker == "w1")
    assert (w1.requests, w1.indexed_blocks, w1.events_synced) == (1, 32, True)
    assert [decision.reason for decision in deployment.selector.recent] == [Reason.HIT, Reason.COLD]


async def test_looking_at_a_decision_sends_nothing():
    deployment = Deployment()
    deployment.selector.choose(deployment.query(prompt(1)))
    assert deployment.selector.loads.in_flight == 0
    assert not deployment.selector.recent


async def test_ranks_of_one_worker_are_targets_of_their_own():
    selector = Selector(RouterConfig(router="round-robin"), BLOCK, registry=PolicyRegistry([]))
    selector.add_worker("w0", CAPACITY, ranks=2)
    targets = {(await selector.route(Query(str(n), [1], block_size=BLOCK))).target for n in range(2)}
    assert targets == {Target("w0", 0), Target("w0", 1)}
    selector.remove_worker("w0")
    assert selector.targets == ()


def test_routing_needs_a_block_size():
    with pytest.raises(ConfigError, match="block size"):
        Selector(RouterConfig(), 0)


def test_kv_without_anybody_to_ask_for_events_is_refused_rather_than_blind():
    with pytest.raises(ConfigError, match="set router-events to false"):
        Selector(RouterConfig(), BLOCK)
    assert Selector(RouterConfig(router_events=False), BLOCK).targets == ()


class SelectorMachine(RuleBasedStateMachine):
    """Anything, in any order: what is in flight and what is known of workers stay true."""

    @initialize(router=st.sampled_from([*BUILT_IN, "no events"]), affinity=st.booleans())
    def begin(self, router, affinity):
        options = {"router": "kv", "router_events": False} if router == "no events" else {"router": router}
        self.deployment = Deployment(workers=2, session_affinity=affinity, router_ttl=5.0, **options)
        self.selector = self.deployment.selector
        self.flying = {}
        self.workers = 2

    @rule(seed=st.integers(0, 5), blocks=st.integers(0, 6), session=st.sampled_from([None, "a", "b"]))
    def send(self, seed, blocks, session):
        query = self.deployment.query([*prompt(seed, 64), *prompt(seed + 9, blocks * BLOCK)], session=session)
        if not self.selector.targets:
            with pytest.raises(Overloaded):
                self.selector.dispatch(query)
            return
        decision = self.selector.dispatch(query)
        assert decision.target in self.selector.targets
        assert decision.explain().worker == decision.target.worker
        self.flying[query.request_id] = query, decision.target

    @rule(data=st.data())
    def end(self, data):
        if self.flying:
            name = data.draw(st.sampled_from(sorted(self.flying)))
            del self.flying[name]
            self.selector.prefilled(name)
            self.selector.finish(name)

    @rule(data=st.data())
    def lose_a_worker_and_reroute(self, data):
        if not self.selector.targets:
            return
        lost = data.draw(st.sampled_from(self.selector.targets))
        self.selector.remove_worker(lost.worker)
        for name, (query, target) in list(self.flying.items()):
            if target == lost:
                try:
                    self.flying[name] = query, self.selector.reroute(query, lost).target
                except Overloaded:
                    del self.flying[name]

    @rule()
    def gain_a_worker(self):
        if self.workers < 8:
            self.deployment.start(f"w{self.workers}")
            self.workers += 1

    @rule(seed=st.integers(0, 5), data=st.data())
    def compute(self, seed, data):
        if self.selector.targets:
            worker = data.draw(st.sampled_from(self.selector.targets)).worker
            if not self.deployment.sources[worker].ranks or not len(self.deployment.sources[worker].normalizer()):
                self.deployment.compute(worker, prompt(seed, 64))

    @rule(seconds=st.floats(0.1, 4.0))
    def pass_time(self, seconds):
        self.deployment.now += seconds
        self.selector.tick()

    @invariant()
    def everything_is_whole(self):
        self.selector.check_integrity()
        assert self.selector.loads.in_flight == len(self.flying)


SelectorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSelectorAgainstAnything = SelectorMachine.TestCase
