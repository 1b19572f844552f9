"""The figures of a process's Routers, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.components.router_fleet import Fleet
from core.observe import LoopHistogram, Metrics
from core.routing import Decision

_FRACTION = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.999)
_LOOKUP = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.1)
_QUEUED = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RouterMetrics(Collector):
    """Shared by the Routers of one process; each is shown under its own label from `add` to `remove`."""

    def __init__(self, metrics: Metrics) -> None:
        """Use `Metrics.part`: a registry takes these names once."""
        self._fleets: dict[str, Fleet] = {}
        self.hit_rate = LoopHistogram(
            "dynamo_router_hit_rate", "Part of a prompt that the chosen worker holds, as the Router sees it.", _FRACTION
        )
        self.reuse_rate = LoopHistogram(
            "dynamo_router_reuse_rate", "Part of a prompt that the worker says it did not compute.", _FRACTION
        )
        self.lookup = LoopHistogram(
            "dynamo_router_lookup_seconds", "Hashing a prompt and searching the prefix index.", _LOOKUP
        )
        self.queue = LoopHistogram(
            "dynamo_router_queue_seconds", "From a request's arrival at the Router to its decision.", _QUEUED
        )
        for collector in (self.hit_rate, self.reuse_rate, self.lookup, self.queue, self):
            metrics.registry.register(collector)

    def add(self, router: str, fleet: Fleet) -> None:
        """Shows a Router from now on; replaces an earlier one of the name."""
        self._fleets[router] = fleet

    def remove(self, router: str) -> None:
        """Shows it no more. Unknown names are no error."""
        self._fleets.pop(router, None)

    def decided(self, decision: Decision, waited: float) -> None:
        """Counts a decision that was made `waited` seconds after the request came."""
        if decision.hits:
            self.hit_rate.observe(decision.hit_rate)
            self.lookup.observe(decision.lookup_seconds)
        self.queue.observe(waited)

    def collect(self) -> Iterable[Metric]:
        """Everything that is read from the Routers at a scrape."""
        gauges = {
            name: GaugeMetricFamily(f"dynamo_router_{name}", text, labels=["router"]) for name, text in _GAUGES.items()
        }
        targets = {
            name: GaugeMetricFamily(f"dynamo_router_{name}", text, labels=["router", "worker", "rank"])
            for name, text in _OF_TARGETS.items()
        }
        reasons = CounterMetricFamily(
            "dynamo_router_decisions", "Decisions, by reason.", labels=["router", "policy", "reason"]
        )
        counters = CounterMetricFamily(
            "dynamo_router_occurrences", "What else happened, by kind.", labels=["router", "kind"]
        )
        for router, fleet in self._fleets.items():
            state = fleet.state()
            routing = state.routing
            values = {
                "workers": len({worker.worker for worker in routing.workers}),
                "refused_workers": len(state.refused),
                "index_blocks": routing.indexed_blocks,
                "queued": routing.queued,
                "in_flight": routing.in_flight,
                "peers": state.peers,
            }
            for name, value in values.items():
                gauges[name].add_metric([router], value)
            for worker in routing.workers:
                labels = [router, worker.worker, str(worker.rank)]
                targets["event_lag_seconds"].add_metric(labels, worker.event_lag)
                targets["events_synced"].add_metric(labels, worker.events_synced)
                targets["worker_blocks"].add_metric(labels, worker.indexed_blocks)
                targets["worker_prefill_tokens"].add_metric(labels, worker.prefill_tokens)
                targets["worker_requests"].add_metric(labels, worker.requests)
                targets["worker_utilization"].add_metric(labels, worker.utilization)
            for reason, count in routing.decisions.items():
                reasons.add_metric([router, routing.policy, reason], count)
            for group, prefix in ((state.counters, ""), (state.events, "events_"), (state.index, "index_")):
                for kind, count in msgspec.structs.asdict(group).items():
                    counters.add_metric([router, prefix + kind], count)
        return [*gauges.values(), *targets.values(), reasons, counters]


_GAUGES = {
    "workers": "Workers that requests can go to.",
    "refused_workers": "Live workers that nothing is sent to; /routing/state says why.",
    "index_blocks": "Blocks in the prefix index.",
    "queued": "Requests that wait for a worker with room.",
    "in_flight": "Requests that were sent and have not ended.",
    "peers": "Other Routers that are live.",
}
_OF_TARGETS = {
    "event_lag_seconds": "From the publishing of the worker's last KV events to their arrival in the index.",
    "events_synced": "1 when nothing is known to be missing of the worker's KV events.",
    "worker_blocks": "Blocks of the worker in the prefix index.",
    "worker_prefill_tokens": "Prompt tokens sent to the worker and not computed yet.",
    "worker_requests": "Requests on the worker.",
    "worker_utilization": "Work over capacity; from 1 on requests wait.",
}
