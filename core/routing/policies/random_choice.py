"""random: any target, each as likely as the others."""

from __future__ import annotations

from collections.abc import Sequence

from core.kv import Target
from core.routing.decision import Decision, Reason
from core.routing.policies.base import StatelessPolicy
from core.routing.query import Query


class RandomChoice(StatelessPolicy):
    """Chance alone; the baseline to beat."""

    name = "random"

    def choose(self, query: Query, targets: Sequence[Target]) -> Decision:
        """Any target."""
        return self.decide(query, targets, self.context.rng.randrange(len(targets)), Reason.RANDOM)
