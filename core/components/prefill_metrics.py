"""The figures of a process's disaggregated prefill, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.kv.session import SessionCounts
from core.observe import Metrics
from core.prefill.decode_side import DecodeTimes
from core.prefill.queue import PrefillQueue

if TYPE_CHECKING:
    from core.components.worker_prefill import RemotePrefill
    from core.prefill.prefill_side import PrefillSide

_ENDED = ("opened", "imported", "released", "expired")
_HELD = ("live", "retired", "freeing", "stuck")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


class PrefillMetrics(Collector):
    """Shared by the workers of one process; each is shown from its `add` to its `remove`."""

    def __init__(self, metrics: Metrics) -> None:
        """Use `Metrics.part`: a registry takes these names once."""
        self.times = DecodeTimes()
        self._decoders: dict[str, RemotePrefill] = {}
        self._prefillers: dict[str, PrefillSide] = {}
        for collector in (self.times.queue, self.times.prefill, self.times.transfer, self):
            metrics.registry.register(collector)

    def add_decoder(self, worker: str, remote: RemotePrefill) -> None:
        """Shows a Worker from now on."""
        self._decoders[worker] = remote

    def add_prefiller(self, worker: str, side: PrefillSide) -> None:
        """Shows a PrefillWorker from now on."""
        self._prefillers[worker] = side

    def remove(self, worker: str) -> None:
        """Shows it no more. Unknown ids are no error."""
        self._decoders.pop(worker, None)
        self._prefillers.pop(worker, None)

    def collect(self) -> Iterable[Metric]:
        """Everything that is read from the workers at a scrape."""
        families = {
            "decisions": _counter(
                "decisions", "Prompts, by where they were to be prefilled and why.", "where", "reason"
            ),
            "ends": _counter("ends", "Remote prefills, by how they ended.", "way"),
            "fallbacks": _counter(
                "fallbacks", "Prefills that could not be had elsewhere, by where it ended and what happened.", "reason"
            ),
            "failures": _counter("failures", "Tasks that a PrefillWorker could not serve, by kind.", "kind"),
        }
        imported = CounterMetricFamily(
            "dynamo_kv_imported_tokens", "Prompt tokens whose KV came from a PrefillWorker.", labels=["worker"]
        )
        moved = CounterMetricFamily(
            "dynamo_kv_imported_bytes", "The same in bytes, where the engine states its layout.", labels=["worker"]
        )
        sessions = CounterMetricFamily(
            "dynamo_kv_sessions", "KV sessions, by how they ended; opened is all of them.", labels=["worker", "outcome"]
        )
        held = GaugeMetricFamily(
            "dynamo_kv_sessions_held", "KV sessions that have not ended, or are not free.", labels=["worker", "state"]
        )
        attempts = GaugeMetricFamily(
            "dynamo_prefill_attempts", "Tasks on a PrefillWorker, by what it does for them.", labels=["worker", "state"]
        )
        tasks = CounterMetricFamily(
            "dynamo_prefill_queue_tasks", "What this process did at the prefill queue.", labels=["kind"]
        )
        for worker, remote in self._decoders.items():
            side = remote.side
            for (where, code), count in remote.decisions.items():
                families["decisions"].add_metric([worker, where, code], count)
            _add(families["ends"], worker, side.ends)
            _add(families["fallbacks"], worker, side.give_ups)
            imported.add_metric([worker], side.imported_tokens)
            size = bytes_per_token(side.host.info.kv_fingerprint)
            if size is not None:
                moved.add_metric([worker], side.imported_tokens * size)
            _add_sessions(sessions, held, worker, side.counts())
        for worker, prefiller in self._prefillers.items():
            _add(families["failures"], worker, prefiller.ends)
            _add_sessions(sessions, held, worker, prefiller.counts())
            computing, holding = prefiller.under_way
            attempts.add_metric([worker, "computing"], computing)
            attempts.add_metric([worker, "holding"], holding)
        for queue in self._queues():
            for kind, count in msgspec.structs.asdict(queue.counts()).items():
                tasks.add_metric([kind], count)
        return [*families.values(), imported, moved, sessions, held, attempts, tasks]

    def _queues(self) -> Iterable[PrefillQueue]:
        """The process's end of the queue; both kinds of workers share one."""
        return {id(remote.side.queue): remote.side.queue for remote in self._decoders.values()}.values()


def bytes_per_token(fingerprint: Mapping[str, str]) -> int | None:
    """Bytes of KV a token, from `EngineInfo.kv_fingerprint`; None when it does not say."""
    try:
        sizes = [int(fingerprint[field]) for field in ("layers", "kv_heads", "head_size", "parts")]
        size = _DTYPE_BYTES[fingerprint["dtype"]]
    except (KeyError, ValueError):
        return None
    for factor in sizes:
        size *= factor
    return size


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"dynamo_prefill_{name}", text, labels=["worker", *labels])


def _add(family: CounterMetricFamily, worker: str, counts: Mapping[str, int]) -> None:
    for label, count in counts.items():
        family.add_metric([worker, str(label)], count)


def _add_sessions(ended: CounterMetricFamily, held: GaugeMetricFamily, worker: str, counts: SessionCounts) -> None:
    for outcome in _ENDED:
        ended.add_metric([worker, outcome], getattr(counts, outcome))
    for state in _HELD:
        held.add_metric([worker, state], getattr(counts, state))
