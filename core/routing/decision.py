"""A routing decision with everything it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from core.kv import Target


class Reason(StrEnum):
    """Why the chosen target was chosen."""

    ONLY = "only"
    """There was no other."""
    HIT = "hit"
    """It holds the most of the prompt, as blocks count."""
    LOAD = "load"
    """Another holds more of the prompt, and is too busy for that to pay."""
    COLD = "cold"
    """Nobody holds any of the prompt: the least busy one."""
    SESSION = "session"
    """The session was there before."""
    TURN = "turn"
    """Its turn, by round robin."""
    RANDOM = "random"
    LEAST_LOADED = "least-loaded"
    TWO_CHOICES = "two-choices"
    """The less busy of two picked at random."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One target as the decision saw it."""

    worker: str
    rank: int
    hit_blocks: float | None
    """Leading prompt blocks it holds, weighted by medium; None when the policy does not look."""
    load: float | None
    """Work ahead, in tokens; None when the policy does not look."""
    score: float | None
    """Larger is better; None when the policy does not score."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A decision, spelled out for people and tools."""

    request_id: str
    policy: str
    worker: str
    rank: int
    reason: Reason
    prompt_tokens: int
    block_size: int
    hit_tokens: float
    """Prompt tokens that the chosen one need not compute, weighted by medium."""
    candidates: list[Candidate]


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes and why. Columns run parallel to `candidates`; an empty one was not looked at."""

    request_id: str
    target: Target
    policy: str
    reason: Reason
    candidates: Sequence[Target]
    prompt_tokens: int
    block_size: int
    hits: Sequence[float] = field(default=())
    """Leading prompt blocks held, weighted by medium."""
    loads: Sequence[float] = field(default=())
    """Work ahead, in tokens."""
    scores: Sequence[float] = field(default=())
    lookup_seconds: float = 0.0
    """Spent in hashing the prompt and searching the index."""

    @property
    def hit_tokens(self) -> float:
        """Prompt tokens that the chosen one need not compute, weighted by medium; 0 when nobody looked."""
        if not self.hits:
            return 0.0
        return min(self.hits[self.candidates.index(self.target)] * self.block_size, self.prompt_tokens)

    @property
    def hit_rate(self) -> float:
        """`hit_tokens` as a fraction of the prompt."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def explain(self) -> Explanation:
        """The decision as data, one entry a candidate."""

        def column(values: Sequence[float]) -> Sequence[float | None]:
            return values or [None] * len(self.candidates)

        rows = zip(self.candidates, column(self.hits), column(self.loads), column(self.scores), strict=True)
        return Explanation(
            request_id=self.request_id,
            policy=self.policy,
            worker=self.target.worker,
            rank=self.target.rank,
            reason=self.reason,
            prompt_tokens=self.prompt_tokens,
            block_size=self.block_size,
            hit_tokens=self.hit_tokens,
            candidates=[
                Candidate(worker=t.worker, rank=t.rank, hit_blocks=hit, load=load, score=score)
                for t, hit, load, score in rows
            ],
        )
