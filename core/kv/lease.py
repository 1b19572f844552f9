"""How long KV is held for somebody else, counted so that no clock of another host takes part.

Two rules keep every use of held KV strictly inside the time for which it is held:

1. The **holder** keeps the blocks for `LeaseTerms.lease` seconds by its own clock, and in the last `guard` seconds of
   that time it neither advertises nor grants any. Whoever asks is told the seconds up to the guard, not to the end.
2. The **user** counts what it was told from *before it asked* (`Deadline.granted`). The answer was made after that
   moment, so the deadline lies before the guard however long question and answer were on their way. It takes off
   `DRIFT` for clocks that run at different speeds, and looks at its clock again when it has finished: what came in
   late is thrown away.

The guard is there for what rule 2 cannot see: a transfer that was told to stop and takes a moment to, and an event loop
that was busy when the deadline passed. A tenth of the lease, at least a quarter of a second, is ten times the longest
stall that is worth surviving and costs nothing but memory held a little longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from core.messages.errors import ConfigError

DRIFT = 0.001
"""Largest difference in speed between two hosts' clocks, as a fraction: quartz is ten times better than this."""

Clock = Callable[[], float]


def lease_clock() -> float:
    """Seconds on a clock that only goes forward and, where the system has one, goes on while the host is suspended.

    A plain monotonic clock stands still during suspension, and the sleeper would believe in leases long over.
    """
    return time.clock_gettime(_CLOCK)


_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class LeaseTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What a holder offers. Seconds."""

    lease: float = 30.0
    """The holder keeps the blocks for so long."""
    guard: float = 3.0
    """The last part of it, in which nobody is granted anything."""

    def __post_init__(self) -> None:
        if not 0 < self.guard <= self.lease / 2:
            raise ConfigError(
                f"kv-lease is {self.lease:g} s with a guard of {self.guard:g} s; the guard must be above 0 and at most "
                "half the lease. Give a longer kv-lease."
            )

    @classmethod
    def of(cls, lease: float) -> LeaseTerms:
        """Terms with the usual guard: a tenth of the lease, at least 0.25 s, at most half the lease.

        Raises `ConfigError` for a lease that is not positive.
        """
        if not lease > 0:
            raise ConfigError(f"kv-lease is {lease:g} s; it must be above 0.")
        return cls(lease=lease, guard=min(max(lease / 10, 0.25), lease / 2))

    @property
    def usable(self) -> float:
        """Seconds from the lease's start within which it may be used."""
        return self.lease - self.guard


class Deadline(msgspec.Struct, frozen=True):
    """A moment on this process's lease clock."""

    at: float
    clock: Clock = lease_clock

    @classmethod
    def granted(cls, asked_at: float, seconds: float, clock: Clock = lease_clock) -> Deadline:
        """The user's deadline for what another worker granted: `asked_at` is when the question was *sent*."""
        return cls(asked_at + seconds * (1 - DRIFT), clock)

    @classmethod
    def after(cls, seconds: float, clock: Clock = lease_clock) -> Deadline:
        """So many seconds from now."""
        return cls(clock() + seconds, clock)

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - self.clock())

    def passed(self) -> bool:
        """Whether it is over; exactly at the deadline it is."""
        return self.clock() >= self.at
