"""Every policy chooses by its own rule, explains itself, and spreads what must be spread."""

import random
from collections import Counter
from importlib.metadata import EntryPoint

import msgspec
import pytest

from core.kv import Target
from core.messages import ConfigError, Medium
from core.routing.config import RouterConfig
from core.routing.decision import Reason
from core.routing.index import PrefixIndex
from core.routing.load import Capacity, LoadTracker
from core.routing.policies.base import PolicyContext
from core.routing.query import Query
from core.routing.registry import BUILT_IN, PolicyRegistry

BLOCK = 16
TARGETS = [Target(f"w{number}") for number in range(8)]
A, B, C = TARGETS[:3]
CAPACITY = Capacity(block_size=BLOCK, num_kv_blocks=1000, max_num_batched_tokens=2048, max_num_seqs=64)


class Bench:
    """A policy with an index, loads and a clock, and a counter for request names."""

    def __init__(self, targets=TARGETS, registry=None, **settings):
        self.now = 0.0
        self.targets = targets
        self.index = PrefixIndex()
        self.loads = LoadTracker(clock=lambda: self.now)
        for target in targets:
            self.loads.add(target, CAPACITY)
        config = RouterConfig(**{"router_seed": 1, **settings})
        context = PolicyContext(config, self.index, self.loads, random.Random(config.router_seed), lambda: self.now)
        self.policy = (registry or PolicyRegistry([])).create(context)
        self.sent = 0

    def query(self, tokens, **fields):
        self.sent += 1
        return Query(f"r{self.sent}", tokens, block_size=BLOCK, **fields)

    def choose(self, tokens, **fields):
        return self.policy.choose(self.query(tokens, **fields), self.targets)

    def send(self, tokens, **fields):
        query = self.query(tokens, **fields)
        decision = self.policy.choose(query, self.targets)
        self.loads.dispatch(
            query.request_id,
            decision.target,
            prompt_tokens=query.prompt_tokens,
            hit_tokens=int(decision.hit_tokens),
        )
        self.policy.dispatched(query, decision.target)
        self.policy.check_integrity()
        return decision

    def cache(self, target, tokens, medium=Medium.DEVICE):
        self.index.place(target, self.query(tokens).hashes, medium=medium)

    def occupy(self, target, tokens):
        self.loads.dispatch(f"busy-{target}-{self.sent}", target, prompt_tokens=tokens)
        self.sent += 1


def prompt(seed, tokens=512):
    rng = random.Random(seed)
    return [rng.randrange(32_000) for _ in range(tokens)]


def test_round_robin_gives_everybody_a_turn_through_changes():
    bench = Bench(router="round-robin", targets=[A, B, C])
    assert [bench.send(prompt(0)).target for _ in range(4)] == [A, B, C, A]
    bench.targets = [A, C]
    assert [bench.send(prompt(0)).target for _ in range(2)] == [C, A]


def test_random_reaches_everybody_and_repeats_with_its_seed():
    chosen = [Bench(router="random", router_seed=seed).send(prompt(0)).target for seed in range(200)]
    assert set(chosen) == set(TARGETS)
    assert chosen[7] == Bench(router="random", router_seed=7).send(prompt(0)).target


def test_least_loaded_takes_the_least_work():
    bench = Bench(router="least-loaded", targets=[A, B, C])
    bench.occupy(A, 100)
    bench.occupy(C, 50)
    assert bench.send(prompt(0)).target == B
    assert bench.send(prompt(0)).target == C


def test_power_of_two_never_takes_the_busiest():
    bench = Bench(router="power-of-two")
    bench.occupy(A, 10_000)
    chosen = {bench.choose(prompt(0)).target for _ in range(300)}
    assert chosen == set(TARGETS) - {A}


def test_power_of_two_is_fair_among_equals():
    bench = Bench(router="power-of-two")
    counts = Counter(bench.choose(prompt(0)).target for _ in range(4000))
    assert min(counts.values()) > 400


def test_kv_goes_where_the_prefix_is():
    bench = Bench()
    bench.cache(C, prompt(1))
    bench.cache(B, prompt(1)[:256])
    decision = bench.choose([*prompt(1), *prompt(2, 64)])
    assert (decision.target, decision.reason) == (C, Reason.HIT)
    assert decision.hit_tokens == 512
    assert decision.hit_rate == 512 / 576


def test_kv_without_a_hit_takes_the_least_busy():
    bench = Bench()
    for target in TARGETS[:-1]:
        bench.occupy(target, 100)
    decision = bench.choose(prompt(1))
    assert (decision.target, decision.reason) == (TARGETS[-1], Reason.COLD)


def test_kv_breaks_ties_by_load_and_then_by_chance():
    bench = Bench(load_weight=0.0)
    bench.cache(A, prompt(1))
    bench.cache(B, prompt(1))
    bench.occupy(A, 10)
    assert bench.choose(prompt(1)).target == B
    chosen = {Bench(router_seed=seed).choose(prompt(1)).target for seed in range(100)}
    assert chosen == set(TARGETS)


def test_kv_weighs_blocks_by_their_medium():
    bench = Bench(targets=[A, B], host_hit_weight=0.5)
    bench.cache(A, prompt(1), medium=Medium.HOST)
    bench.cache(B, prompt(1)[:320])
    decision = bench.choose(prompt(1))
    assert decision.target == B
    assert list(decision.hits) == [16.0, 20.0]


def test_kv_keeps_adapters_and_salts_apart():
    bench = Bench()
    bench.cache(A, prompt(1))
    assert bench.choose(prompt(1)).reason is Reason.HIT
    assert bench.choose(prompt(1), lora="french").reason is Reason.COLD
    assert bench.choose(prompt(1), cache_salt="tenant").reason is Reason.COLD


def test_a_prompt_shorter_than_a_block_goes_by_load():
    bench = Bench(targets=[A, B])
    bench.occupy(A, 5)
    assert bench.choose([1, 2, 3]).target == B


@pytest.mark.parametrize("settings", [{}, {"router_events": False}], ids=["events", "no events"])
def test_a_burst_of_identical_cold_prompts_does_not_land_on_one_worker(settings):
    bench = Bench(**settings)
    counts = Counter(bench.send(prompt(1, 2048)).target for _ in range(200))
    assert set(counts) == set(TARGETS)
    assert max(counts.values()) <= 2 * 200 / len(TARGETS)


def test_a_hot_prefix_spreads_when_its_holder_is_busy():
    """With the default weights the holder is left when the work ahead there is twice what its cache saves."""
    bench = Bench()
    bench.cache(A, prompt(1, 1024))
    reasons = Counter()
    counts = Counter()
    for number in range(200):
        decision = bench.send([*prompt(1, 1024), *prompt(100 + number, 256)])
        counts[decision.target] += 1
        reasons[decision.reason] += 1
    assert counts[A] > 200 / len(TARGETS)
    assert len(counts) == len(TARGETS)
    assert counts[A] < 100
    assert reasons[Reason.HIT] == counts[A]
    assert reasons[Reason.LOAD] == 200 - counts[A]


def test_hits_alone_pile_everything_on_the_holder():
    """What the load term is for: without it the same traffic stays on one worker."""
    bench = Bench(load_weight=0.0)
    bench.cache(A, prompt(1, 1024))
    assert {bench.send([*prompt(1, 1024), *prompt(n, 256)]).target for n in range(50)} == {A}


def test_a_holder_that_is_idle_again_gets_its_prefix_back():
    bench = Bench(targets=[A, B])
    bench.cache(A, prompt(1))
    bench.occupy(A, 5000)
    busy = bench.loads.in_flight
    assert bench.choose(prompt(1)).reason is Reason.LOAD
    assert busy == 1
    bench.loads.finish(f"busy-{A}-1")
    assert bench.choose(prompt(1)).target == A


def test_without_events_what_was_routed_is_remembered_for_a_while():
    bench = Bench(router_events=False, router_ttl=60.0)
    first = bench.send(prompt(1))
    bench.loads.finish(first.request_id)
    again = bench.choose([*prompt(1), *prompt(2)])
    assert (again.target, again.reason) == (first.target, Reason.HIT)
    bench.now = 59.0
    assert bench.choose(prompt(1)).reason is Reason.HIT
    bench.now = 60.0
    assert bench.choose(prompt(1)).reason is Reason.COLD
    bench.policy.check_integrity()


def test_without_events_a_shared_beginning_outlives_the_ends():
    bench = Bench(targets=[A], router_events=False, router_ttl=60.0)
    shared = prompt(1, 256)
    bench.send([*shared, *prompt(2, 256)])
    bench.now = 40.0
    bench.send([*shared, *prompt(3, 256)])
    bench.now = 70.0
    assert bench.choose([*shared, *prompt(2, 256)]).hit_tokens == 256
    assert bench.choose([*shared, *prompt(3, 256)]).hit_tokens == 512


def test_without_events_no_more_is_remembered_than_a_worker_can_hold():
    bench = Bench(targets=[A], router_events=False)
    for number in range(10):
        bench.send(prompt(number, 300 * BLOCK))
    assert bench.policy.index.blocks_of(A) == CAPACITY.num_kv_blocks
    assert bench.choose(prompt(6, 300 * BLOCK)).hit_tokens == 100 * BLOCK  # its end went first
    assert bench.choose(prompt(5, 300 * BLOCK)).hit_tokens == 0
    bench.policy.check_integrity()


def test_without_events_a_lost_worker_is_forgotten():
    bench = Bench(router_events=False)
    first = bench.send(prompt(1))
    bench.policy.forget(first.target)
    bench.loads.finish(first.request_id)
    assert bench.choose(prompt(1)).reason is Reason.COLD


def test_a_session_stays_until_its_worker_is_full_or_gone():
    bench = Bench(router="random", session_affinity=True)
    home = bench.send(prompt(0), session="alice").target
    for _ in range(20):
        decision = bench.send(prompt(0, 8), session="alice")
        assert (decision.target, decision.reason) == (home, Reason.SESSION)
    bench.occupy(home, 10_000)
    moved = bench.send(prompt(0), session="alice")
    while moved.target == home:  # chance may pick the same one again
        moved = bench.send(prompt(0), session="alice")
    assert moved.reason is Reason.RANDOM
    assert bench.send(prompt(0, 8), session="alice").target == moved.target
    bench.targets = [target for target in TARGETS if target != moved.target]
    bench.policy.forget(moved.target)
    assert bench.send(prompt(0, 8), session="alice").target != moved.target


def test_a_quiet_session_may_go_anywhere():
    bench = Bench(router="round-robin", session_affinity=True, session_ttl=10.0)
    first = bench.send(prompt(0), session="alice").target
    bench.now = 9.0
    assert bench.send(prompt(0, 8), session="alice").target == first
    bench.now = 19.5
    assert bench.send(prompt(0, 8), session="alice").reason is Reason.TURN


def test_requests_without_a_session_are_routed_as_ever():
    bench = Bench(router="round-robin", session_affinity=True, targets=[A, B])
    assert [bench.send(prompt(0)).target for _ in range(3)] == [A, B, A]


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_decision_says_what_it_was_made_from(name):
    bench = Bench(router=name)
    bench.cache(A, prompt(1))
    decision = bench.send(prompt(1))
    told = decision.explain()
    assert [(c.worker, c.rank) for c in told.candidates] == [(t.worker, t.rank) for t in TARGETS]
    assert (told.policy, told.worker) == (name, decision.target.worker)
    assert told.prompt_tokens == 512
    assert msgspec.json.decode(msgspec.json.encode(told), type=type(told)) == told
    if name == "kv":
        assert told.candidates[0].hit_blocks == 32
        assert all(c.score is not None and c.load is not None for c in told.candidates)
        assert max(told.candidates, key=lambda c: c.score).worker == told.worker
        assert decision.lookup_seconds > 0


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_single_target_is_chosen_because_it_is_the_only_one(name):
    decision = Bench(router=name, targets=[A]).send(prompt(1))
    assert (decision.target, decision.reason) == (A, Reason.ONLY)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("round_robbin", "did you mean round-robin"), ("kvv", "did you mean kv"), ("zzz", "known are kv, least-loaded")],
)
def test_an_unknown_policy_is_refused_with_the_nearest_names(name, hint):
    with pytest.raises(ConfigError, match=f"Unknown routing policy '{name}'; {hint}"):
        Bench(router=name)


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("kv_hit_weight", -1.0, "kv-hit-weight is -1.0; expected a number of 0 or more."),
        ("load_weight", float("nan"), "load-weight is nan; expected a number of 0 or more."),
        ("load_weight", float("inf"), "load-weight is inf; expected a number of 0 or more."),
        ("load_weight", "heavy", "load-weight is 'heavy'; expected a number of 0 or more."),
        ("kv_hit_weight", True, "kv-hit-weight is True; expected a number of 0 or more."),
        ("host_hit_weight", 1.5, "host-hit-weight is 1.5; expected a number from 0 to 1."),
        ("router_ttl", -3, "router-ttl is -3; expected a number of 0 or more."),
        ("router_queue_limit", 0, "router-queue-limit is 0; expected 1 or more."),
        ("router_queue_threshold", 0.0, "router-queue-threshold is 0, which holds every request for ever"),
        ("router_queue_threshold", float("nan"), "router-queue-threshold is nan; expected a number of 0 or more."),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_a_sentence(setting, value, sentence):
    with pytest.raises(ConfigError) as caught:
        Bench(**{setting: value})
    assert str(caught.value).startswith(sentence)


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(ConfigError, match="both 0, so every worker scores the same"):
        Bench(kv_hit_weight=0.0, load_weight=0.0)


def test_settings_are_written_with_dashes():
    config = msgspec.convert({"router": "kv", "kv-hit-weight": 2.0, "router-events": False}, RouterConfig)
    assert (config.kv_hit_weight, config.router_events) == (2.0, False)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"kv-hit-wieght": 2.0}, RouterConfig)


class LastNamed:
    """A third party's policy: the last name in the alphabet."""

    name = "last-named"

    def __init__(self, context):
        self.inner = BUILT_IN["round-robin"](context)

    def choose(self, query, targets):
        return self.inner.decide(query, targets, targets.index(max(targets)), Reason.TURN)

    def dispatched(self, query, target):
        pass

    def forget(self, target):
        pass

    def check_integrity(self):
        pass


def entry(name, value):
    return EntryPoint(name, value, "dynamo.policies")


def test_a_package_adds_a_policy_through_an_entry_point():
    registry = PolicyRegistry([entry("last-named", f"{__name__}:LastNamed")])
    assert "last-named" in registry.names
    assert Bench(router="last-named", registry=registry).send(prompt(0)).target == TARGETS[-1]


def test_a_package_cannot_replace_a_built_in_policy():
    registry = PolicyRegistry([entry("kv", f"{__name__}:LastNamed")])
    assert Bench(registry=registry).policy.name == "kv"
    assert type(Bench(registry=registry).policy) is not LastNamed


def test_a_policy_that_does_not_load_says_why():
    registry = PolicyRegistry([entry("broken", "no_such_module:Policy")])
    with pytest.raises(ConfigError, match=r"Policy 'broken' .* could not be loaded: ModuleNotFoundError"):
        Bench(router="broken", registry=registry)


def test_a_policy_that_lacks_a_method_is_refused():
    registry = PolicyRegistry([entry("half", f"{__name__}:Half")])
    with pytest.raises(ConfigError, match="Policy 'half' has no method dispatched, forget, check_integrity"):
        Bench(router="half", registry=registry)


class Half:
    """Implements a quarter of what a policy needs."""

    def __init__(self, context):
        pass

    def choose(self, query, targets):
        raise NotImplementedError
