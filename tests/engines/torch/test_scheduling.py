"""Random traffic through block pool and scheduler, without a model: the invariants hold after every step.

The model is replaced by arithmetic: a step's next tokens are random numbers. Everything else is the engine's own.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.messages import EngineRequest, KvCleared, KvRemoved, KvStored, StopConditions
from engines.torch.block_pool import BlockPool
from engines.torch.sampling_state import SamplingState
from engines.torch.scheduler import Scheduler
from engines.torch.sequence import Sequence


def sequence_of(tokens: list[int], arrival: int, max_len: int, **request: Any) -> Sequence:
    """A sequence as the engine makes it."""
    max_tokens = request.pop("max_tokens", 8)
    made = EngineRequest(
        request_id=str(arrival), token_ids=tokens, stop=StopConditions(max_tokens=max_tokens), **request
    )
    sampling = SamplingState(made, vocab_size=8, eos_token_ids=(), device="cpu", seed=0)
    return Sequence(made, arrival=arrival, sampling=sampling, constrainer=None, max_len=max_len)


class Mirror:
    """What somebody knows of the cache who sees its events alone."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...], str | None]] = {}

    def apply(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, KvCleared):
                self.blocks.clear()
            elif isinstance(event, KvRemoved):
                for key in event.block_hashes:
                    del self.blocks[key]
            else:
                assert isinstance(event, KvStored)
                parent, size = event.parent_hash, event.block_size
                assert parent is None or parent in self.blocks
                for at, key in enumerate(event.block_hashes):
                    tokens = tuple(event.token_ids[at * size : (at + 1) * size])
                    assert key not in self.blocks
                    self.blocks[key] = (parent, tokens, event.cache_salt)
                    parent = key

    def cached(self, tokens: list[int], size: int, salt: str | None) -> int:
        """Blocks of `tokens` that are reusable, one token left to compute."""
        parent, count = None, 0
        for start in range(0, len(tokens) - size, size):
            wanted = (parent, tuple(tokens[start : start + size]), salt)
            parent = next((key for key, block in self.blocks.items() if block == wanted), None)
            if parent is None:
                break
            count += 1
        return count


class Traffic(RuleBasedStateMachine):
    """Requests come, run and are aborted in any order."""

    @initialize(
        num_blocks=st.integers(3, 14),
        block_size=st.integers(1, 5),
        max_seqs=st.integers(1, 5),
        budget=st.integers(1, 20),
        caching=st.booleans(),
    )
    def start(self, num_blocks: int, block_size: int, max_seqs: int, budget: int, caching: bool) -> None:
        self.pool = BlockPool(num_blocks, block_size, caching=caching)
        self.max_seqs, self.budget = max_seqs, budget
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=max_seqs, max_num_batched_tokens=budget, prompt_logprobs_chunk=3
        )
        self.limit = num_blocks * block_size
        self.arrivals = 0
        self.live: list[Sequence] = []
        self.mirror = Mirror()
        self.contents: dict[int, tuple[Any, ...]] = {}

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        more=st.integers(1, 12),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, "a"]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(self, tokens: list[int], more: int, priority: int, salt: str | None, prompt_logprobs: int | None) -> None:
        """Two-token vocabularies make prefixes meet."""
        sequence = sequence_of(
            tokens[: self.limit - 1],
            self.arrivals,
            self.limit,
            max_tokens=more,
            priority=priority,
            cache_salt=salt,
            prompt_logprobs=prompt_logprobs,
        )
        self.arrivals += 1
        self.live.append(sequence)
        self.scheduler.add(sequence)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.live:
            sequence = data.draw(st.sampled_from(self.live))
            self.live.remove(sequence)
            self.scheduler.finish(sequence)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        if self.live:
            self._step(lambda: data.draw(st.integers(0, 1)))

    def _step(self, sample: Any) -> None:
        before = {s: s.cached_tokens for s in self.live}
        chunks = self.scheduler.schedule()
        assert 0 < sum(chunk.size for chunk in chunks) <= self.budget
        assert len({chunk.sequence for chunk in chunks}) == len(chunks) <= self.max_seqs
        self.mirror.apply(self.pool.take_events())
        for sequence, size in chunks:
            assert 1 <= size <= sequence.num_left
            if before[sequence] is None and sequence.cached_tokens:
                assert sequence.cached_tokens < len(sequence.token_ids)
            self._check_contents(sequence)
        written = [block for s, n in chunks for block in self._span(s, n)]
        assert len(written) == len(set(written)), "two sequences write to one block"
        for chunk in chunks:
            ends = chunk.size == chunk.sequence.num_left
            self._write(chunk.sequence, chunk.size)
            self.scheduler.computed(chunk)
            if ends:
                chunk.sequence.prompt_logprobs = None
                chunk.sequence.token_ids.append(sample())
                if len(chunk.sequence.token_ids) >= chunk.sequence.end:
                    self.live.remove(chunk.sequence)
                    self.scheduler.finish(chunk.sequence)

    def _span(self, sequence: Sequence, size: int) -> set[int]:
        first, last = sequence.num_computed, sequence.num_computed + size - 1
        return set(sequence.block_table[first // self.pool.block_size : last // self.pool.block_size + 1])

    def _write(self, sequence: Sequence, size: int) -> None:
        """What a step's KV depends on: all tokens up to there, and the salt."""
        for position in range(sequence.num_computed, sequence.num_computed + size):
            block, offset = divmod(position, self.pool.block_size)
            known = self.contents.get(sequence.block_table[block], ())
            self.contents[sequence.block_table[block]] = (
                *known[:offset],
                (sequence.request.cache_salt, tuple(sequence.token_ids[: position + 1])),
            )

    def _check_contents(self, sequence: Sequence) -> None:
        """What a sequence takes for computed is its own tokens' KV, whoever computed it."""
        for position in range(sequence.num_computed):
            block, offset = divmod(position, self.pool.block_size)
            expected = (sequence.request.cache_salt, tuple(sequence.token_ids[: position + 1]))
            assert self.contents[sequence.block_table[block]][offset] == expected

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "pool"):
            self.scheduler.check_integrity()
            assert self.scheduler.num_unfinished == len(self.live)
            self.mirror.apply(self.pool.take_events())
            fresh = Mirror()
            fresh.apply(self.pool.snapshot())
            assert fresh.blocks == self.mirror.blocks

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from([None, "a"]))
    def reuse_is_what_the_events_say(self, tokens: list[int], salt: str | None) -> None:
        self.mirror.apply(self.pool.take_events())
        assert len(self.pool.match(tokens, salt, None)) == self.mirror.cached(tokens, self.pool.block_size, salt)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        steps = 0
        while self.live:
            self._step(lambda: 0)
            steps += 1
            assert steps < 20_000, "requests do not finish"
        self.scheduler.check_integrity()
        assert self.pool.num_held == 0


Traffic.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestTraffic = Traffic.TestCase


def make(num_blocks: int, **config: int) -> Scheduler:
    """A scheduler of blocks of four tokens."""
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "prompt_logprobs_chunk": 64}
    return Scheduler(BlockPool(num_blocks, 4), **{**defaults, **config})


def run_step(scheduler: Scheduler) -> list[str]:
    """Runs one step and names what was in it, in order."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        ends = chunk.size == chunk.sequence.num_left
        scheduler.computed(chunk)
        if ends:
            chunk.sequence.token_ids.append(0)
    return [chunk.sequence.request_id for chunk in chunks]


def test_larger_priority_goes_first_then_arrival() -> None:
    """With one seat, the line is served by priority, and in order of arrival within one."""
    scheduler = make(20, max_num_seqs=1)
    sequences = [
        sequence_of([arrival] * 3, arrival, 80, priority=p, max_tokens=1) for arrival, p in enumerate((0, 5, 0, 5, -1))
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    order = []
    while scheduler.num_unfinished:
        [name] = run_step(scheduler)
        order.append(name)
        scheduler.finish(sequences[int(name)])
    assert order == ["1", "3", "0", "2", "4"]


def test_decoding_goes_before_prompts() -> None:
    """A long prompt takes what running sequences leave of the budget, and never delays their next token."""
    scheduler = make(64, max_num_batched_tokens=8)
    scheduler.add(sequence_of([1] * 4, 0, 256, max_tokens=99))
    run_step(scheduler)
    scheduler.add(sequence_of([2] * 100, 1, 256))
    for _ in range(5):
        chunks = scheduler.schedule()
        assert [(chunk.sequence.request_id, chunk.size) for chunk in chunks] == [("0", 1), ("1", 7)]
        for chunk in chunks:
            scheduler.computed(chunk)
        chunks[0].sequence.token_ids.append(0)


def test_the_lowest_priority_gives_way() -> None:
    """When blocks run out, the sequence of least priority is preempted, however early it came."""
    scheduler = make(6)
    low = sequence_of([1] * 8, 0, 24, max_tokens=16, priority=-1)
    high = sequence_of([2] * 8, 1, 24, max_tokens=16, priority=1)
    for sequence in (low, high):
        scheduler.add(sequence)
    while scheduler.num_preemptions == 0:
        run_step(scheduler)
    assert scheduler.waiting == [low]
    assert scheduler.running == [high]
    scheduler.check_integrity()


def test_salt_and_lora_part_the_cache() -> None:
    """A prefix is shared only within the same salt and LoRA."""
    scheduler = make(32)
    first = sequence_of(list(range(8)) * 2, 0, 128, cache_salt="a", lora="x")
    scheduler.add(first)
    run_step(scheduler)
    tokens = first.token_ids
    found = {(s, x): len(scheduler.pool.match(tokens, s, x)) for s in (None, "a", "b") for x in (None, "x")}
    assert found == {key: 4 if key == ("a", "x") else 0 for key in found}


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    """Beside long prompts of its priority it is computed at once, out of turn; they go on, in the order they came."""
    scheduler = Scheduler(BlockPool(400, 4), max_num_seqs=8, max_num_batched_tokens=32, prompt_logprobs_chunk=8)
    long = [sequence_of([7 - n] * 300, n, 400) for n in range(3)]
    for sequence in long:
        scheduler.add(sequence)
    for chunk in (chunks := scheduler.schedule()):
        scheduler.computed(chunk)
    assert [(chunk.sequence, chunk.size) for chunk in chunks] == [(long[0], 32)]
    short = sequence_of([0] * 12, 3, 400)
    scheduler.add(short)
    for chunk in (chunks := scheduler.schedule()):
        scheduler.computed(chunk)
    assert {(chunk.sequence, chunk.size) for chunk in chunks} == {(long[0], 16), (short, 12)}
    scheduler.check_integrity()


def test_a_short_prompt_waits_for_its_betters() -> None:
    """Out of turn is not out of rank, and never with blocks that the first in line needs."""
    scheduler = Scheduler(BlockPool(400, 4), max_num_seqs=8, max_num_batched_tokens=32, prompt_logprobs_chunk=8)
    scheduler.add(sequence_of([1] * 300, 0, 400, priority=1))
    short = sequence_of([0] * 12, 1, 400)
    scheduler.add(short)
    assert short not in {chunk.sequence for chunk in scheduler.schedule()}
    cramped = Scheduler(BlockPool(80, 4), max_num_seqs=8, max_num_batched_tokens=32, prompt_logprobs_chunk=8)
    cramped.add(sequence_of([1] * 300, 0, 400))
    for chunk in cramped.schedule():
        cramped.computed(chunk)
    cramped.add(sequence_of([2] * 300, 1, 400))
    short = sequence_of([0] * 12, 2, 400)
    cramped.add(short)
    assert short not in {chunk.sequence for chunk in cramped.schedule()}
