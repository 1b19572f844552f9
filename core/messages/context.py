"""What accompanies a request through the house, beside the request itself."""

from __future__ import annotations

import time

import msgspec


class RequestContext(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Identity, deadline and wishes of one client request. Passed on by every component, unchanged."""

    request_id: str
    """Correlates everything that is logged, measured and aborted for this request."""
    deadline: float | None = None
    """`time.monotonic()` of this process after which nobody waits for the answer; see `remaining`."""
    session: str | None = None
    """Conversation or user, for session affinity."""
    priority: int = 0
    """Larger is served first."""
    explain: bool = False
    """The client asked for the reasons of routing decisions."""

    def remaining(self) -> float | None:
        """Seconds left, never negative; None without a deadline. Crosses processes in place of `deadline`."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
