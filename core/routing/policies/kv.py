"""kv: the target with the best score of cached prefix against work ahead. See `core.routing.scoring`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from core.kv import Target
from core.routing.decision import Decision, Reason
from core.routing.index import PrefixIndex
from core.routing.policies.base import PolicyContext, StatelessPolicy
from core.routing.query import Query
from core.routing.scoring import best, column, score_targets


class KvPolicy(StatelessPolicy):
    """Scores by the index that follows the workers' KV events."""

    name = "kv"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._weights = context.config.tier_weights()

    @property
    def index(self) -> PrefixIndex:
        """Where prefixes are looked up."""
        return self.context.index

    def choose(self, query: Query, targets: Sequence[Target]) -> Decision:
        """The best score; ties go to the less busy, then to chance."""
        config = self.context.config
        hashes = query.hashes
        start = time.perf_counter()
        overlap = self.index.match(hashes)
        lookup = query.hash_seconds + time.perf_counter() - start
        hits = column(overlap.weighted(self._weights), targets)
        loads = column(self.context.loads.work, targets)
        scores = score_targets(
            hits,
            loads,
            prompt_tokens=query.prompt_tokens,
            block_size=query.block_size,
            kv_hit_weight=config.kv_hit_weight,
            load_weight=config.load_weight,
        )
        position = best(scores, loads, self.context.rng)
        most = max(hits)
        if len(targets) == 1:
            reason = Reason.ONLY
        elif not most:
            reason = Reason.COLD
        else:
            reason = Reason.HIT if hits[position] == most else Reason.LOAD
        return Decision(
            request_id=query.request_id,
            target=targets[position],
            policy=self.name,
            reason=reason,
            candidates=targets,
            prompt_tokens=query.prompt_tokens,
            block_size=query.block_size,
            hits=hits,
            loads=loads,
            scores=scores,
            lookup_seconds=lookup,
        )
