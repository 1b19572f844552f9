"""The figures of one process, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.messages import Load
from core.observe.histogram import LoopHistogram

# The time of birth beside every counter, which the text format can only show as a gauge.
disable_created_metrics()  # type: ignore[no-untyped-call]

Part = TypeVar("Part")

LoadSource = Callable[[], Sequence[Load]]
"""What is on one worker's engine now."""

_FIRST_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 5)
_WHOLE = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_ENGINE = {
    "running": "Requests that the engine works on.",
    "waiting": "Requests that wait for the engine.",
    "kv_blocks_used": "KV blocks that running requests hold.",
    "kv_blocks_total": "KV blocks there are.",
    "tokens_in_flight": "Prompt tokens accepted and not computed yet.",
}


class Metrics:
    """Every metric of the serving path. One instance a process; methods are for the event loop's thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._parts: dict[Callable[[Metrics], object], object] = {}
        self.time_to_first_token = self._histogram(
            "dynamo_time_to_first_token_seconds",
            "From the request's arrival to its first piece of answer.",
            _FIRST_TOKEN,
        )
        self.inter_token = self._histogram(
            "dynamo_inter_token_latency_seconds", "Between successive pieces of a streamed answer.", _GAP
        )
        self.duration = self._histogram(
            "dynamo_request_duration_seconds", "From the request's arrival to the end of its answer.", _WHOLE
        )
        self.in_flight = Gauge("dynamo_requests_in_flight", "Requests being answered.", registry=self.registry)
        self._requests = Counter(
            "dynamo_requests", "Requests, by endpoint and HTTP status (499: the client left).", ["endpoint", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._bound: dict[tuple[str, int], Counter] = {}
        self._finished = Counter("dynamo_choices", "Choices, by why they ended.", ["finish"], registry=self.registry)
        self._finish_bound: dict[str, Counter] = {}
        self._prompt = Counter("dynamo_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self._cached = Counter(
            "dynamo_cached_tokens", "Tokens of prompts whose KV was at hand.", registry=self.registry
        )
        self._output = Counter("dynamo_output_tokens", "Tokens generated.", registry=self.registry)
        self._replicas = Gauge("dynamo_replicas", "Replicas that serve.", ["service"], registry=self.registry)
        self._failures = Counter(
            "dynamo_replica_failures", "Replicas that failed while they served.", ["service"], registry=self.registry
        )
        self._loads = _EngineLoads()
        self.registry.register(self._loads)

    def part(self, kind: Callable[[Metrics], Part]) -> Part:
        """A service's own metrics: one `kind(self)` a process, because a registry takes its names once."""
        found = self._parts.get(kind)
        if found is None:
            found = self._parts[kind] = kind(self)
        return cast(Part, found)

    def request(self, endpoint: str, status: int) -> None:
        """Counts an answered request."""
        key = (endpoint, status)
        counter = self._bound.get(key)
        if counter is None:
            counter = self._bound[key] = self._requests.labels(endpoint, str(status))
        counter.inc()

    def tokens(self, prompt: int, cached: int, output: int) -> None:
        """Counts one request's tokens, when it ends."""
        self._prompt.inc(prompt)
        self._output.inc(output)
        if cached:
            self._cached.inc(cached)

    def finished(self, reason: str) -> None:
        """Counts an ended choice: "stop", "length", "tool_calls", or "aborted"."""
        counter = self._finish_bound.get(reason)
        if counter is None:
            counter = self._finish_bound[reason] = self._finished.labels(reason)
        counter.inc()

    def replicas(self, service: str, live: int) -> None:
        """Shows how many replicas of a service serve now."""
        self._replicas.labels(service).set(live)
        self._failures.labels(service)  # seen at zero from the start, so that the first failure is an increase

    def replica_failed(self, service: str) -> None:
        """Counts a replica's failure."""
        self._failures.labels(service).inc()

    def add_engine(self, worker_id: str, load: LoadSource) -> None:
        """Shows a worker's engine from now on; `load` is called at each scrape. Replaces an earlier one of the id."""
        self._loads.sources[worker_id] = load

    def remove_engine(self, worker_id: str) -> None:
        """Shows the worker no more. Unknown ids are no error."""
        self._loads.sources.pop(worker_id, None)

    def render(self) -> bytes:
        """Everything, in the text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float]) -> LoopHistogram:
        histogram = LoopHistogram(name, documentation, bounds)
        self.registry.register(histogram)
        return histogram


class _EngineLoads(Collector):
    def __init__(self) -> None:
        self.sources: dict[str, LoadSource] = {}

    def collect(self) -> Iterable[Metric]:
        families = {
            field: GaugeMetricFamily(f"dynamo_engine_{field}", text, labels=["worker", "rank"])
            for field, text in _ENGINE.items()
        }
        for worker, source in self.sources.items():
            for load in source():
                for field, family in families.items():
                    family.add_metric([worker, str(load.data_parallel_rank)], getattr(load, field))
        return families.values()
