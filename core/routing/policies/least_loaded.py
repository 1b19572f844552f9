"""least-loaded: the target with the least work ahead."""

from __future__ import annotations

from collections.abc import Sequence

from core.kv import Target
from core.routing.decision import Decision, Reason
from core.routing.policies.base import StatelessPolicy
from core.routing.query import Query
from core.routing.scoring import column, least


class LeastLoaded(StatelessPolicy):
    """Work is `LoadTracker.work`: tokens to prefill and, at a discount, tokens resident."""

    name = "least-loaded"

    def choose(self, query: Query, targets: Sequence[Target]) -> Decision:
        """The least busy target; ties go to chance."""
        loads = column(self.context.loads.work, targets)
        return self.decide(query, targets, least(loads, self.context.rng), Reason.LEAST_LOADED, loads=loads)
