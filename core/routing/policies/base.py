"""What a policy is, and what it is made from."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.kv import Target
from core.routing.config import RouterConfig
from core.routing.decision import Decision, Reason
from core.routing.index import PrefixIndex
from core.routing.load import LoadTracker
from core.routing.query import Query


@dataclass(frozen=True)
class PolicyContext:
    """What a policy may read. `index` follows the workers' KV events; policies do not write to it."""

    config: RouterConfig
    index: PrefixIndex
    loads: LoadTracker
    rng: random.Random
    """Seeded by `router-seed`; every choice by chance is made with it."""
    clock: Callable[[], float] = time.monotonic


class Policy(Protocol):
    """Chooses a target for a request. One instance a router, called from one event loop."""

    name: str

    def choose(self, query: Query, targets: Sequence[Target]) -> Decision:
        """One of `targets`, which is never empty. Changes nothing that a second call would notice, but whose turn it
        is: a choice may be thrown away."""

    def dispatched(self, query: Query, target: Target) -> None:
        """The request goes to `target`."""

    def forget(self, target: Target) -> None:
        """The target is lost. Idempotent; also called for targets never heard of."""

    def check_integrity(self) -> None:
        """Raises `AssertionError` when what the policy remembers contradicts itself."""


class StatelessPolicy:
    """A policy that remembers nothing of targets and requests."""

    name: str

    def __init__(self, context: PolicyContext) -> None:
        self.context = context

    def dispatched(self, query: Query, target: Target) -> None:
        """Nothing is remembered."""

    def forget(self, target: Target) -> None:
        """Nothing is remembered."""

    def check_integrity(self) -> None:
        """Nothing is remembered."""

    def decide(
        self, query: Query, targets: Sequence[Target], position: int, reason: Reason, *, loads: Sequence[float] = ()
    ) -> Decision:
        """The decision for the target at `position`, of a policy that looks at loads at most."""
        return Decision(
            request_id=query.request_id,
            target=targets[position],
            policy=self.name,
            reason=Reason.ONLY if len(targets) == 1 else reason,
            candidates=targets,
            prompt_tokens=query.prompt_tokens,
            block_size=query.block_size,
            loads=loads,
        )
