"""round-robin: every target in turn."""

from __future__ import annotations

from collections.abc import Sequence

from core.kv import Target
from core.routing.decision import Decision, Reason
from core.routing.policies.base import PolicyContext, StatelessPolicy
from core.routing.query import Query


class RoundRobin(StatelessPolicy):
    """Turns go by name rather than by position, so that a target that comes or goes costs nobody its turn."""

    name = "round-robin"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._last: Target | None = None

    def choose(self, query: Query, targets: Sequence[Target]) -> Decision:
        """The next after the last one chosen, in the order of names."""
        last = self._last
        later = [target for target in targets if last is not None and target > last]
        self._last = min(later or targets)
        return self.decide(query, targets, targets.index(self._last), Reason.TURN)
