"""Which local blocks a transfer may still touch, and the frees that wait for that to end.

A transfer that was given up may go on: a released NIXL READ keeps writing into its target when the peer wakes up.
Blocks are therefore held from before a transfer starts until the transport itself says that it is over, whatever
became of the request, and a worker returns blocks to its allocator through `free_when_idle`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

Free = Callable[[list[int]], None]


class Hold:
    """One transfer's claim on blocks. `release` is idempotent and may be called from any thread."""

    __slots__ = ("_blocks", "_owner")

    def __init__(self, owner: InFlight, blocks: list[int]) -> None:
        self._owner: InFlight | None = owner
        self._blocks = blocks

    def release(self) -> None:
        """Say that the transfer can touch the blocks no more."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._drop(self._blocks)


class InFlight:
    """Counts of transfers by block. Thread-safe."""

    def __init__(self, deliver: Callable[[Callable[[], None]], object]) -> None:
        """`deliver` runs a postponed free where the allocator lives: usually `loop.call_soon_threadsafe`."""
        self._deliver = deliver
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()
        self._waiting: dict[int, Free] = {}

    def hold(self, blocks: Iterable[int]) -> Hold:
        """Claim blocks for a transfer that is about to start."""
        listed = list(blocks)
        with self._lock:
            self._counts.update(listed)
        return Hold(self, listed)

    def free_when_idle(self, blocks: Iterable[int], free: Free) -> None:
        """Call `free` with the blocks that no transfer touches at once, and with each other one when it is settled.

        A block may wait only once: raises `ValueError` for one whose free is already postponed (a double free).
        """
        idle: list[int] = []
        with self._lock:
            listed = list(blocks)
            again = [block for block in listed if block in self._waiting]
            if again:
                raise ValueError(f"blocks {again[:8]} are freed twice: an earlier free still waits for their transfers")
            for block in listed:
                if block in self._counts:
                    self._waiting[block] = free
                else:
                    idle.append(block)
        if idle:
            free(idle)

    @property
    def blocks(self) -> frozenset[int]:
        """Blocks that some transfer may still touch."""
        with self._lock:
            return frozenset(self._counts)

    @property
    def waiting(self) -> int:
        """Freed blocks that cannot be reused yet: the quarantine, as shown in metrics."""
        with self._lock:
            return len(self._waiting)

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every count is positive and every waiting block is still touched."""
        with self._lock:
            assert all(count > 0 for count in self._counts.values()), f"counts {dict(self._counts)}"
            assert self._waiting.keys() <= self._counts.keys(), f"frees forgotten: {self._waiting.keys()}"

    def _drop(self, blocks: list[int]) -> None:
        settled: dict[Free, list[int]] = {}
        with self._lock:
            self._counts.subtract(blocks)
            for block in blocks:
                if self._counts.get(block) == 0:
                    del self._counts[block]
                    free = self._waiting.pop(block, None)
                    if free is not None:
                        settled.setdefault(free, []).append(block)
        for free, ready in settled.items():
            self._deliver(lambda free=free, ready=ready: free(ready))  # type: ignore[misc]
