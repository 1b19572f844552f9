"""The router: chooses the worker for each request by what the workers hold and how busy they are."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import msgspec
import xxhash

from core.components import router_config
from core.components.prefill_messages import WorkerExplanation
from core.components.router_config import RouterConfig
from core.components.router_messages import Routed, RouteQuery, RouterState
from core.components.worker import Worker
from core.graph import Preflight, Service, client_of, depends, endpoint, on_start, on_stop, service
from core.messages import Delta, EngineError, EngineRequest, RequestContext, Unavailable
from core.routing import Candidate, Decision, Query
from core.runtime import Address, Client, InstanceGone

if TYPE_CHECKING:
    from core.components.router_fleet import Fleet
    from core.components.router_metrics import RouterMetrics

SHOWN_CANDIDATES = 12
"""Candidates in an explanation on a response: enough to see why, few enough for a header."""
LONGEST_SESSION = 64
"""Characters; longer names of sessions are remembered by their hash."""


@service()
class Router(Service):
    """Sends each request to the worker that a policy chooses, and streams what that worker answers."""

    Config = RouterConfig
    config: RouterConfig
    worker = depends(Worker)

    def __init__(self) -> None:
        self._fleet: Fleet | None = None
        self._metrics: RouterMetrics | None = None
        self._workers: Client

    @classmethod
    def preflight(cls, config: RouterConfig, look: Preflight) -> None:
        """Raises `ConfigError` for settings that cannot work together, or not with the workers' engine."""
        router_config.check(config, look)

    @on_start
    async def connect(self) -> None:
        """Wait for the first workers and learn what they hold."""
        from core.components.router_fleet import Fleet
        from core.components.router_metrics import RouterMetrics

        assert self.worker is not None, "the Router's only edge is not pruned"
        runtime, namespace = self.context.runtime, self.context.settings.namespace
        self._workers = client_of(self.worker.generate)
        self._fleet = Fleet(
            self.config.routing(),
            runtime,
            namespace,
            self.context.instance,
            workers=self._workers,
            feed=client_of(self.worker.feed),
            peers=runtime.client(Address(namespace, self.context.service, "generate")),
            fail=self.context.fail,
        )
        card = await self._fleet.start(self.config.min_workers, self.context.report)
        self.context.metadata = card.encode()
        self._metrics = self.context.metrics.part(RouterMetrics)
        self._metrics.add(self._label, self._fleet)

    @endpoint()
    async def generate(self, request: EngineRequest, context: RequestContext) -> AsyncGenerator[Delta, None]:
        """Generate on the chosen worker. With `context.explain` the first delta has the decision.

        A worker that is gone before its first delta, or cannot take the request now, is replaced by the next best,
        once. Raises what the worker raises, `Unavailable` without a worker, `Overloaded` when the queue is full.
        """
        fleet, metrics = self._running, self._metrics
        assert metrics is not None
        selector = fleet.selector
        query = self._query(request.request_id, request, context.session, context.priority)
        came = time.monotonic()
        self._check_workers()
        decision = await selector.route(query, timeout=context.remaining())
        deltas: AsyncGenerator[Delta, None] | None = None
        try:
            fleet.changed()
            metrics.decided(decision, time.monotonic() - came)
            deltas = self._send(request, context, decision)
            try:
                first = await anext(deltas, None)
            except EngineError as error:
                if not error.retryable:
                    raise
                decision = self._next_best(query, decision, error)
                deltas = self._send(request, context, decision)
                first = await anext(deltas, None)
            if first is None:
                return
            selector.prefilled(request.request_id)
            fleet.changed()
            if first.cached_tokens is not None:
                metrics.reuse_rate.observe(first.cached_tokens / max(1, len(request.token_ids)))
            if context.explain:
                first.decision = self._explained(decision, first.decision)
            yield first
            async for delta in deltas:
                yield delta
        finally:
            # Before anything is awaited: a cancellation must not keep the request in the load for ever.
            selector.finish(request.request_id)
            fleet.changed()
            if deltas is not None:
                await deltas.aclose()

    @endpoint()
    async def explain(self, request: RouteQuery) -> AsyncGenerator[Routed, None]:
        """One item: where the prompt would go now, with every candidate. Nothing is sent."""
        self._check_workers()
        query = self._query("explain", request, request.session, 0)
        yield self._routed(self._running.selector.choose(query), None)

    @endpoint()
    async def state(self, request: None) -> AsyncGenerator[RouterState, None]:
        """One item: everything that this Router knows."""
        yield self._running.state()

    @endpoint()
    async def ready(self, request: None) -> AsyncGenerator[bool, None]:
        """One item when a worker can take requests. Raises `Unavailable` when none can."""
        self._check_workers()
        yield True

    @on_stop
    async def end(self) -> None:
        """End what follows the workers."""
        if self._metrics is not None:
            self._metrics.remove(self._label)
        if self._fleet is not None:
            await self._fleet.close()

    def check_integrity(self) -> None:
        """Raises `AssertionError` when what the Router knows contradicts itself."""
        self._running.check_integrity()

    def _send(self, request: EngineRequest, context: RequestContext, decision: Decision) -> AsyncGenerator[Delta, None]:
        target = decision.target
        if self._running.ranks.get(target.worker, 1) > 1:
            request = msgspec.structs.replace(request, data_parallel_rank=target.rank)
        return self._workers.stream(request, context, target.worker)

    def _next_best(self, query: Query, failed: Decision, error: EngineError) -> Decision:
        """The decision for a second try. Raises the error, or what it means to a client, when there is nobody else."""
        fleet, worker = self._running, failed.target.worker
        gone = isinstance(error, InstanceGone)
        if gone:
            fleet.lost(worker)
        if all(target.worker == worker for target in fleet.selector.targets):
            if gone:
                self._check_workers()
            raise error
        fleet.counters.rerouted += 1
        return fleet.selector.reroute(query, failed.target)

    def _query(self, request_id: str, prompt: EngineRequest | RouteQuery, session: str | None, priority: int) -> Query:
        if session is not None and len(session) > LONGEST_SESSION:
            session = xxhash.xxh3_128_hexdigest(session.encode())
        return Query(
            request_id,
            prompt.token_ids,
            block_size=self._running.selector.block_size,
            lora=prompt.lora,
            cache_salt=prompt.cache_salt,
            session=session,
            priority=priority,
        )

    def _routed(self, decision: Decision, limit: int | None) -> Routed:
        explanation = decision.explain()
        candidates = explanation.candidates
        if limit is not None and len(candidates) > limit:
            chosen = (decision.target.worker, decision.target.rank)

            def order(candidate: Candidate) -> tuple[bool, float, float]:
                first = (candidate.worker, candidate.rank) != chosen
                return first, -(candidate.score or 0.0), candidate.load or 0.0

            candidates = sorted(candidates, key=order)[:limit]
        values = msgspec.structs.asdict(explanation) | {"candidates": [_rounded(c) for c in candidates]}
        omitted = len(explanation.candidates) - len(candidates)
        return Routed(**values, router=self.context.instance, candidates_omitted=omitted)

    def _explained(self, decision: Decision, workers: bytes | None) -> bytes:
        """The decision, with what the worker itself decided."""
        routed = self._routed(decision, SHOWN_CANDIDATES)
        if workers is not None:
            prefill = msgspec.json.decode(workers, type=WorkerExplanation).prefill
            routed = msgspec.structs.replace(routed, prefill=prefill)
        return msgspec.json.encode(routed)

    def _check_workers(self) -> None:
        fleet = self._running
        if fleet.selector.targets:
            return
        if fleet.refused:
            worker, why = next(iter(fleet.refused.items()))
            raise Unavailable(f"No worker can be used now. {worker}: {why}")
        raise Unavailable("No worker is live now; one that failed may be coming back, so try again in a moment.")

    @property
    def _label(self) -> str:
        return f"{self.context.service}-{self.context.replica}"

    @property
    def _running(self) -> Fleet:
        assert self._fleet is not None, "the endpoints are served only after the fleet has started"
        return self._fleet


def _rounded(candidate: Candidate) -> Candidate:
    """Floats as people read them."""

    def short(value: float | None) -> float | None:
        return value if value is None else round(value, 4)

    return msgspec.structs.replace(
        candidate, hit_blocks=short(candidate.hit_blocks), load=short(candidate.load), score=short(candidate.score)
    )
