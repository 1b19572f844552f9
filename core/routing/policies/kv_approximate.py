"""kv without events: remembers where prefixes were sent, and takes them for cached there for a while.

For engines that publish no KV events, and with `router-events: false`. What was evicted early, or cached by another
router's requests, is not known; a time to live and, where the worker's capacity is known, its size bound the error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from core.kv import Target
from core.routing.decision import Decision
from core.routing.index import PrefixIndex
from core.routing.policies.base import PolicyContext
from core.routing.policies.kv import KvPolicy
from core.routing.query import Query


class KvApproximatePolicy(KvPolicy):
    """The score of `kv`, over an index of its own that is written by what is dispatched."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._own = PrefixIndex(max_blocks=context.config.router_max_blocks)
        # Least recently sent first. A prompt is entered from its end, so a block always goes before those it follows.
        self._expiry: dict[Target, OrderedDict[int, float]] = {}

    @property
    def index(self) -> PrefixIndex:
        """What was sent."""
        return self._own

    def choose(self, query: Query, targets: Sequence[Target]) -> Decision:
        """As `kv`, after forgetting what is too old."""
        now = self.context.clock()
        for target in targets:
            self._expire(target, now)
        return super().choose(query, targets)

    def dispatched(self, query: Query, target: Target) -> None:
        """The prompt's blocks count as cached there from now on."""
        hashes = query.hashes
        expires = self.context.clock() + self.context.config.router_ttl
        known = self._expiry.setdefault(target, OrderedDict())
        for block in reversed(hashes):
            known[block] = expires
            known.move_to_end(block)
        self._own.place(target, hashes)
        capacity = self.context.loads.capacity(target)
        if capacity is not None and capacity.num_kv_blocks:
            self._drop(target, known, len(known) - capacity.num_kv_blocks)

    def forget(self, target: Target) -> None:
        """Nothing is cached on a target that is lost."""
        self._expiry.pop(target, None)
        self._own.forget(target)

    def _expire(self, target: Target, now: float) -> None:
        known = self._expiry.get(target)
        if not known:
            return
        count = 0
        for expires in known.values():
            if expires > now:
                break
            count += 1
        self._drop(target, known, count)

    def _drop(self, target: Target, known: OrderedDict[int, float], count: int) -> None:
        if count > 0:
            self._own.remove(target, [known.popitem(last=False)[0] for _ in range(count)])

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the index has other blocks than those that will expire."""
        self._own.check_integrity()
        full = self._own.counters.refused_full + self._own.counters.refused_unreachable
        for target, known in self._expiry.items():
            held = self._own.blocks_of(target)
            assert held == len(known) or (full and held < len(known)), f"{target}: {held} blocks, {len(known)} expire"
