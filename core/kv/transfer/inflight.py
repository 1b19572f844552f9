"""Which local blocks a transfer may still touch, and the frees that wait for that to end.

A transfer that was given up may go on: a released NIXL READ keeps writing into its target when the peer wakes up.
Blocks are therefore held from before a transfer starts until the transport itself says that it is over, whatever
became of the request, and a worker returns blocks to its allocator through `free_when_idle`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

Free = Callable[[list[int]], None]


class Hold:
    """One transfer's claim on blocks. `release` is idempotent and may be called from any thread."""

    __slots__ = ("_owner", "blocks")

    def __init__(self, owner: InFlight, blocks: Sequence[int]) -> None:
        self._owner: InFlight | None = owner
        self.blocks = blocks

    def release(self) -> None:
        """Say that the transfer can touch the blocks no more."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._drop(self)


class InFlight:
    """Claims of transfers on blocks. Thread-safe; a claim costs nothing by block unless a free waits for it."""

    def __init__(self, deliver: Callable[[Callable[[], None]], object]) -> None:
        """`deliver` runs a postponed free where the allocator lives: usually `loop.call_soon_threadsafe`."""
        self._deliver = deliver
        self._lock = threading.Lock()
        self._holds: set[Hold] = set()
        self._waiting: dict[int, Free] = {}

    def hold(self, blocks: Sequence[int]) -> Hold:
        """Claim blocks for a transfer that is about to start. The sequence must not change afterwards."""
        hold = Hold(self, blocks)
        with self._lock:
            self._holds.add(hold)
        return hold

    def free_when_idle(self, blocks: Iterable[int], free: Free) -> None:
        """Call `free` with the blocks that no transfer touches at once, and with each other one when it is settled.

        A block may wait only once: raises `ValueError` for one whose free is already postponed (a double free).
        """
        listed = list(blocks)
        with self._lock:
            again = [block for block in listed if block in self._waiting]
            if again:
                raise ValueError(f"blocks {again[:8]} are freed twice: an earlier free still waits for their transfers")
            claimed = self._claimed()
            for block in listed:
                if block in claimed:
                    self._waiting[block] = free
        idle = [block for block in listed if block not in claimed]
        if idle:
            free(idle)

    @property
    def blocks(self) -> frozenset[int]:
        """Blocks that some transfer may still touch."""
        with self._lock:
            return frozenset(self._claimed())

    @property
    def waiting(self) -> int:
        """Freed blocks that cannot be reused yet: the quarantine, as shown in metrics."""
        with self._lock:
            return len(self._waiting)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every waiting block is still claimed."""
        with self._lock:
            forgotten = self._waiting.keys() - self._claimed()
            assert not forgotten, f"blocks {sorted(forgotten)[:8]} wait to be freed and no transfer touches them"

    def _claimed(self) -> set[int]:
        return set().union(*(hold.blocks for hold in self._holds))

    def _drop(self, hold: Hold) -> None:
        settled: dict[Free, list[int]] = {}
        with self._lock:
            self._holds.discard(hold)
            if self._waiting:
                claimed = self._claimed()
                for block in hold.blocks:
                    if block not in claimed and block in self._waiting:
                        settled.setdefault(self._waiting.pop(block), []).append(block)
        for free, ready in settled.items():
            self._deliver(lambda free=free, ready=ready: free(ready))  # type: ignore[misc]
