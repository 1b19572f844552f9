"""Session affinity: a session goes back to the target it was on, whatever the policy underneath would say.

The key is what the caller names as the session: `user`, `prompt_cache_key`, or a header. A session moves when its
target is gone or saturated (it would wait for a full step of other people's work there), and stays where it moved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from core.kv import Target
from core.routing.decision import Decision, Reason
from core.routing.policies.base import Policy, PolicyContext
from core.routing.query import Query

MAX_SESSIONS = 100_000
"""Sessions remembered; past it the one that has been quiet longest is forgotten."""
SATURATED = 1.0
"""Utilization (see `LoadTracker.utilization`) from which on a session leaves its target."""


class SessionAffinity:
    """Wraps another policy, which decides for new sessions and for requests without one."""

    def __init__(self, context: PolicyContext, inner: Policy) -> None:
        self.name = inner.name
        self.inner = inner
        self._context = context
        self._sessions: OrderedDict[str, tuple[Target, float]] = OrderedDict()

    def choose(self, query: Query, targets: Sequence[Target]) -> Decision:
        """The session's target while it is live and has room; otherwise what the wrapped policy says."""
        known = self._sessions.get(query.session) if query.session is not None else None
        if known is not None:
            target, expires = known
            if (
                expires > self._context.clock()
                and target in targets
                and self._context.loads.utilization(target) < SATURATED
            ):
                return Decision(
                    request_id=query.request_id,
                    target=target,
                    policy=self.name,
                    reason=Reason.ONLY if len(targets) == 1 else Reason.SESSION,
                    candidates=targets,
                    prompt_tokens=query.prompt_tokens,
                    block_size=query.block_size,
                )
        return self.inner.choose(query, targets)

    def dispatched(self, query: Query, target: Target) -> None:
        """The session is on `target` now."""
        if query.session is not None:
            self._sessions[query.session] = (target, self._context.clock() + self._context.config.session_ttl)
            self._sessions.move_to_end(query.session)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        self.inner.dispatched(query, target)

    def forget(self, target: Target) -> None:
        """Sessions of a lost target go anywhere."""
        for session in [session for session, (place, _) in self._sessions.items() if place == target]:
            del self._sessions[session]
        self.inner.forget(target)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when too much is remembered, or the wrapped policy objects."""
        assert len(self._sessions) <= MAX_SESSIONS, f"{len(self._sessions)} sessions are remembered"
        self.inner.check_integrity()
