"""power-of-two: the less busy of two targets picked at random.

Nearly as even as looking at all of them, and it does not send everybody to the same target when several routers share
one stale picture of the load.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.kv import Target
from core.routing.decision import Decision, Reason
from core.routing.policies.base import StatelessPolicy
from core.routing.query import Query
from core.routing.scoring import column


class PowerOfTwo(StatelessPolicy):
    """Two different targets by chance, then the one with less work; equal ones by the same chance."""

    name = "power-of-two"

    def choose(self, query: Query, targets: Sequence[Target]) -> Decision:
        """The less busy of two."""
        rng = self.context.rng
        first, second = rng.sample(range(len(targets)), 2) if len(targets) > 1 else (0, 0)
        loads = column(self.context.loads.work, targets)
        chosen = first if loads[first] <= loads[second] else second
        return self.decide(query, targets, chosen, Reason.TWO_CHOICES, loads=loads)
