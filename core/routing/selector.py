"""Everything that routing a request takes, in one place: who is live, what they hold, how busy they are, who waits.

    selector.add_worker("worker-0", capacity)          # membership, from discovery
    decision = await selector.route(query)             # waits in the queue when every worker is saturated
    ...                                                # send the request to decision.target
    selector.prefilled(query.request_id)               # its first token came
    selector.finish(query.request_id)                  # it ended, however it did

A worker that turns out to be gone when the request gets there: `reroute` names the next best, once. Nothing here does
I/O: KV events come in through `follower.offer`, and what the follower wants to ask of workers goes out through `ask`.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import msgspec

from core.kv import KvFollower, KvReplayRequest, Target
from core.messages import ConfigError, Load, Overloaded, Unavailable
from core.routing.config import RouterConfig
from core.routing.decision import Decision, Reason
from core.routing.index import PrefixIndex
from core.routing.load import Capacity, InflightReport, LoadTracker
from core.routing.policies.base import PolicyContext
from core.routing.query import Query
from core.routing.queue import RouterQueue
from core.routing.registry import PolicyRegistry

KEPT_DECISIONS = 256
"""Latest decisions kept to be looked at."""


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """One target in `RoutingState`."""

    worker: str
    rank: int
    prefill_tokens: int
    resident_tokens: int
    requests: int
    utilization: float
    """See `LoadTracker.utilization`."""
    indexed_blocks: int
    events_synced: bool
    event_lag: float
    """Seconds."""


class RoutingState(msgspec.Struct, frozen=True, kw_only=True):
    """What a router knows, for `GET /routing/state`."""

    policy: str
    workers: list[WorkerState]
    indexed_blocks: int
    queued: int
    in_flight: int
    decisions: dict[str, int]
    """Decisions since the start, by reason."""


class Selector:
    """Routes requests of one model. One instance a router, used from one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        block_size: int,
        *,
        router: str = "router",
        ask: Callable[[KvReplayRequest], None] | None = None,
        registry: PolicyRegistry | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`block_size`: tokens in a KV block, the same on all workers. `router`: this router among several.

        `ask` sends a worker a request for what is missing of its KV events; None when the workers publish none.
        Raises `ConfigError` for settings that make no sense.
        """
        if block_size < 1:
            raise ConfigError(f"Routing needs the block size of the workers' KV cache; found {block_size}.")
        config.check()
        if config.router == "kv" and config.router_events and ask is None:
            raise ConfigError(
                "The policy 'kv' follows the workers' KV events, and these workers publish none; "
                "set router-events to false, and it remembers what it routed instead."
            )
        self.config = config
        self.block_size = block_size
        self.index = PrefixIndex(max_blocks=config.router_max_blocks)
        self.loads = LoadTracker(router, clock=clock)
        self._context = PolicyContext(config, self.index, self.loads, random.Random(config.router_seed), clock)
        self.policy = (registry or PolicyRegistry()).create(self._context)
        self._follows = ask is not None and config.router_events
        self.follower = KvFollower(self.index, ask or _nobody, clock=clock, wall_clock=wall_clock)
        self.queue: RouterQueue[Decision] = RouterQueue(
            config.router_queue_limit, config.router_queue_order, clock=clock
        )
        self.recent: deque[Decision] = deque(maxlen=KEPT_DECISIONS)
        """The latest decisions, oldest first."""
        self.reasons: Counter[Reason] = Counter()
        self._rerouted: set[str] = set()

    @property
    def targets(self) -> tuple[Target, ...]:
        """The live targets."""
        return self.loads.targets

    def add_worker(self, worker: str, capacity: Capacity | None = None, *, ranks: int = 1) -> None:
        """A worker has come, or says more of itself. Idempotent."""
        for rank in range(ranks):
            target = Target(worker, rank)
            self.loads.add(target, capacity)
            if self._follows:
                self.follower.follow(target)
        self.queue.poke()

    def remove_worker(self, worker: str) -> None:
        """A worker is lost: nothing more goes there, from this moment on. Idempotent."""
        for target in [target for target in self.targets if target.worker == worker]:
            self.loads.remove(target)
            self.follower.unfollow(target)
            self.index.forget(target)
            self.policy.forget(target)
        self.queue.poke()

    async def route(self, query: Query, *, timeout: float | None = None) -> Decision:  # noqa: ASYNC109
        """Where the request goes; it counts as in flight from here on, until `finish`.

        With `router-queue-threshold` set, waits while every worker is saturated, for `timeout` seconds at most.
        Raises `Overloaded` when there is no worker, the queue is full, or the time is up; `RequestRejected` for
        token ids that are none.
        """
        if not self.targets:
            raise Unavailable("No worker is live; try again when one has started.", retry_after=5.0)
        threshold = self.config.router_queue_threshold
        if threshold is None:
            return self.dispatch(query)

        def attempt() -> Decision | None:
            room = [target for target in self.targets if self.loads.utilization(target) < threshold]
            return self._send(query, self.choose(query, room)) if room else None

        return await self.queue.submit(
            attempt, priority=query.priority, timeout=timeout, undo=lambda decision: self.finish(decision.request_id)
        )

    def dispatch(self, query: Query) -> Decision:
        """`route` without waiting, whatever the load. Raises `Overloaded` when there is no worker."""
        return self._send(query, self.choose(query))

    def choose(self, query: Query, targets: Sequence[Target] | None = None) -> Decision:
        """A decision that is only looked at: nothing is sent. Raises `Overloaded` when there is nobody to choose."""
        among = self.targets if targets is None else targets
        if not among:
            raise Unavailable("No worker is live; try again when one has started.", retry_after=5.0)
        return self.policy.choose(query, among)

    def reroute(self, query: Query, failed: Target) -> Decision:
        """The next best target for a request that did not reach `failed`, once a request.

        Raises `Overloaded` (which a client may retry) the second time, or when there is no other target.
        """
        others = [target for target in self.targets if target.worker != failed.worker]
        if query.request_id in self._rerouted or not others:
            self.finish(query.request_id)
            raise Overloaded(f"Worker {failed} went away before the request reached it, and no other took it.")
        decision = self._send(query, self.choose(query, others))
        self._rerouted.add(query.request_id)
        return decision

    def prefilled(self, request_id: str) -> None:
        """The first token has come. Idempotent; unknown ids are left alone."""
        self.loads.prefilled(request_id)
        self.queue.poke()

    def finish(self, request_id: str) -> None:
        """The request has ended, however it did. Idempotent; unknown ids are left alone."""
        self.loads.finish(request_id)
        self._rerouted.discard(request_id)
        self.queue.poke()

    def report(self, target: Target, load: Load) -> None:
        """What a worker says of its load."""
        self.loads.report(target, load)
        self.queue.poke()

    def merge(self, report: InflightReport) -> None:
        """What another router has in flight."""
        self.loads.merge(report)
        self.queue.poke()

    def tick(self) -> None:
        """Call it about once a second: asks again for lost KV events, forgets silent routers, frees memory."""
        if self._follows:
            self.follower.tick()
        self.loads.tick()
        self.index.sweep(50_000)
        self.queue.poke()

    def state(self) -> RoutingState:
        """What is known now."""
        workers = []
        for target, load in self.loads.snapshot().items():
            workers.append(
                WorkerState(
                    worker=target.worker,
                    rank=target.rank,
                    prefill_tokens=load.prefill_tokens,
                    resident_tokens=load.resident_tokens,
                    requests=load.requests,
                    utilization=self.loads.utilization(target),
                    indexed_blocks=self.index.blocks_of(target),
                    events_synced=self.follower.synced(target),
                    event_lag=self.follower.lag(target),
                )
            )
        return RoutingState(
            policy=self.policy.name,
            workers=workers,
            indexed_blocks=len(self.index),
            queued=len(self.queue),
            in_flight=self.loads.in_flight,
            decisions={str(reason): count for reason, count in self.reasons.items()},
        )

    def _send(self, query: Query, decision: Decision) -> Decision:
        self.loads.dispatch(
            query.request_id,
            decision.target,
            prompt_tokens=query.prompt_tokens,
            hit_tokens=int(decision.hit_tokens),
        )
        self.policy.dispatched(query, decision.target)
        self.recent.append(decision)
        self.reasons[decision.reason] += 1
        return decision

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a part contradicts itself or another."""
        for part in (self.index, self.loads, self.follower, self.queue, self.policy):
            part.check_integrity()
        assert set(self.index.targets) <= set(self.targets), "the index knows targets that are not live"


def _nobody(request: KvReplayRequest) -> None:
    raise AssertionError("KV events are followed, and there is nobody to ask for them")
