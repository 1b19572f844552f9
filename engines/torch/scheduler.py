"""Decides what the next step computes: which sequences, and how many tokens of each.

Every sequence has tokens whose KV is still to be computed: a whole prompt, a chunk's rest, or the one token sampled
last. A step takes decoding sequences first, then prompts under way, then waiting ones, until the token budget is
spent, so that a long prompt never holds up a running stream. Within each, larger priority goes first, then arrival.
While short prompts wait beside long ones of their priority, half of the budget is theirs, out of turn, so that a chat
does not wait until somebody's book has been read.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

from engines.torch.block_pool import BlockPool
from engines.torch.kv_holds import Hold, Holds
from engines.torch.sequence import Sequence

SCAN = 64
"""Waiting sequences among which a short prompt is looked for: bounds what a step spends on a long line."""


class Chunk(NamedTuple):
    """Part of a step: the next `size` tokens of `sequence`."""

    sequence: Sequence
    size: int


class Scheduler:
    """Waiting and running sequences. Not thread-safe: the engine thread owns it."""

    def __init__(
        self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int, prompt_logprobs_chunk: int
    ) -> None:
        """`prompt_logprobs_chunk`: most tokens a step computes of a prompt whose log-probabilities were asked for."""
        self.pool = pool
        self._max_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._share = max_num_batched_tokens // 2
        """Tokens of a step that long prompts leave while short ones are about; what fits into it is short."""
        self._prompt_logprobs_chunk = prompt_logprobs_chunk
        self.waiting: list[Sequence] = []
        self.ready: list[Sequence] = []
        """Sequences whose prompt's KV was imported, and that wait for a place among the running ones."""
        self.running: list[Sequence] = []
        self.holds = Holds(pool)
        self._cramped = False
        self.num_preemptions = 0

    @property
    def cramped(self) -> bool:
        """Whether a sequence waits for want of blocks: those that get free are for it, and no room is reserved."""
        return self._cramped and bool(self.waiting)

    @property
    def num_unfinished(self) -> int:
        """Sequences that still have a token to come."""
        return len(self.waiting) + len(self.ready) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence that holds nothing yet. Pre: it fits into the pool when it is alone."""
        bisect.insort(self.waiting, sequence, key=_rank)

    def resume(self, sequence: Sequence, hold: Hold) -> None:
        """Takes a sequence on whose prompt's KV was imported. Its first token may be left to be computed."""
        if sequence.wants_prompt_logprobs:
            self.pool.release(hold.table)  # they can only be had by computing the prompt
            self.add(sequence)
            return
        sequence.block_table = hold.table
        sequence.num_computed = hold.num_tokens
        sequence.num_hashed, sequence.chain = hold.num_hashed, hold.chain
        bisect.insort(self.ready, sequence, key=_rank)

    def finish(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it stands, and frees its blocks."""
        self._remove(sequence)
        self._release(sequence)

    def park(self, sequence: Sequence, name: str) -> None:
        """Forgets a sequence and keeps its prompt's KV as a hold, in the very table of the sequence."""
        self._remove(sequence)
        self.holds.keep(name, Hold(sequence.block_table, sequence.num_computed))

    def schedule(self) -> list[Chunk]:
        """The next step; the blocks that it writes are allocated. Empty only when there is nothing to do, or when
        holds leave too little room for any sequence.
        """
        budget = self._budget
        chunks: list[Chunk] = []
        scheduled: set[Sequence] = set()
        kept = self._share if self._shorts_wait() else 0
        for sequence in sorted(self.running, key=lambda s: (s.num_left > 1, s.rank)):
            count = self._chunk(sequence, self._allowed(sequence, budget, kept))
            if count == 0:
                continue
            if sequence.block_table and self._make_room(sequence, count, scheduled):
                chunks.append(Chunk(sequence, count))
                scheduled.add(sequence)
                budget -= count
        self._cramped = False
        while budget > 0 and len(self.running) < self._max_seqs:
            if self.ready and (self._cramped or not self.waiting or _rank(self.ready[0]) < _rank(self.waiting[0])):
                # It holds its blocks already: going on is what gives them back.
                sequence = self.ready.pop(0)
                self.running.append(sequence)
                count = self._chunk(sequence, budget)
                if not self._make_room(sequence, count, scheduled):
                    continue
            elif self.waiting and not self._cramped:
                place = self._next_waiting(budget, kept)
                if place is None:
                    break
                sequence = self.waiting[place]
                count = self._admit(sequence, self._allowed(sequence, budget, kept))
                if count == 0:
                    self._cramped = True
                    continue
                self.running.append(self.waiting.pop(place))
            else:
                break
            chunks.append(Chunk(sequence, count))
            scheduled.add(sequence)
            budget -= count
        assert chunks or not self.num_unfinished or self.holds, "sequences are left and none can be computed"
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """Records that a chunk's KV is in the cache, and makes the blocks that it filled reusable."""
        sequence, count = chunk
        sequence.num_computed += count
        size = self.pool.block_size
        full = sequence.num_computed // size
        if full > sequence.num_hashed:
            request = sequence.request
            tokens = sequence.token_ids[sequence.num_hashed * size : full * size]
            sequence.chain = self.pool.store(
                sequence.block_table, sequence.num_hashed, tokens, sequence.chain, request.cache_salt, request.lora
            )
            sequence.num_hashed = full

    def check_integrity(self) -> None:
        """Asserts that blocks are held by those that may, and each by as many as say so."""
        assert all(not sequence.block_table for sequence in self.waiting), "a waiting sequence holds blocks"
        for line in (self.waiting, self.ready):
            assert line == sorted(line, key=_rank), "a waiting line is out of order"
        assert len(self.running) <= self._max_seqs
        tables = [sequence.block_table for sequence in (*self.running, *self.ready)]
        self.pool.check_integrity([*tables, *self.holds.tables])

    def _shorts_wait(self) -> bool:
        """Whether a short prompt is to be computed, of no lower priority than any long one."""
        prompts = [s for s in self.running if s.num_left > 1]
        if len(self.running) < self._max_seqs:
            prompts += self.waiting[:SCAN]
        if not prompts:
            return False
        first = min(s.rank[0] for s in prompts)
        return any(s.rank[0] == first and s.num_left <= self._share for s in prompts)

    def _allowed(self, sequence: Sequence, budget: int, kept: int) -> int:
        """How much of the budget a sequence may take, when `kept` is for short prompts."""
        return budget if sequence.num_left <= self._share else max(0, budget - kept)

    def _next_waiting(self, budget: int, kept: int) -> int | None:
        """Place in the waiting line of the one to admit: the first, or a short prompt of its priority that does not
        keep it from the blocks it needs when only what is kept for such is left.
        """
        head = self.waiting[0]
        if self._allowed(head, budget, kept):
            return 0
        free = self.pool.num_free - self._missing(head, len(head.token_ids))
        for place, sequence in enumerate(self.waiting[:SCAN]):
            if sequence.rank[0] != head.rank[0]:
                break
            if sequence.num_left <= self._share and self._missing(sequence, len(sequence.token_ids)) <= free:
                return place
        return None

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        if sequence.wants_prompt_logprobs:
            budget = min(budget, self._prompt_logprobs_chunk)
        return min(sequence.num_left, budget)

    def _missing(self, sequence: Sequence, tokens: int) -> int:
        return -(-tokens // self.pool.block_size) - len(sequence.block_table)

    def _make_room(self, sequence: Sequence, count: int, scheduled: set[Sequence]) -> bool:
        """Extends the block table for the next `size` tokens, at the cost of sequences that rank after this one.

        False when there is no room: a decoding sequence was then preempted itself, a prompt under way waits a step.
        """
        missing = self._missing(sequence, sequence.num_computed + count)
        while missing > self.pool.num_free:
            victim = max((other for other in self.running if other not in scheduled), key=_rank)
            if victim is sequence and scheduled and sequence.num_left > 1:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table.extend(self.pool.allocate(missing))
        return True

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Gives the first waiting sequence its cached prefix and room for its first chunk; 0 when it must wait."""
        request = sequence.request
        cached: list[int] = []
        if not sequence.wants_prompt_logprobs:
            cached = self.pool.match(sequence.token_ids, request.cache_salt, request.lora)
        total = -(-len(sequence.token_ids) // self.pool.block_size)
        if total - len(cached) > self.pool.num_free - self.pool.count_free(cached):
            return 0
        self.pool.acquire(cached)
        sequence.block_table.extend(cached)
        sequence.num_computed = len(cached) * self.pool.block_size
        sequence.num_hashed = len(cached)
        sequence.chain = self.pool.digest_of(cached[-1]) if cached else None
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
        count = self._chunk(sequence, budget)
        sequence.block_table.extend(self.pool.allocate(self._missing(sequence, sequence.num_computed + count)))
        return count

    def _remove(self, sequence: Sequence) -> None:
        next(line for line in (self.running, self.waiting, self.ready) if sequence in line).remove(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        del sequence.block_table[:]
        sequence.num_computed = sequence.num_hashed = 0
        sequence.chain = None


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
