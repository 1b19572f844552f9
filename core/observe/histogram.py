"""A histogram for one event loop: an observation is a bisection and an addition, no lock, no label lookup."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class LoopHistogram(Collector):
    """Observed from one thread only; read at scrape. Exposed as an ordinary Prometheus histogram."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        """`bounds`: upper bounds of the buckets, ascending, without infinity."""
        if list(bounds) != sorted(set(bounds)) or not bounds:
            raise ValueError(f"bucket bounds must ascend, found {list(bounds)}")
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_gaps(self, times: Sequence[float]) -> None:
        """Counts the gaps between successive times: one call a request instead of one a token."""
        counts = self._counts
        bounds = self._bounds
        previous = times[0]
        for time in times[1:]:
            counts[bisect_left(bounds, time - previous)] += 1
            previous = time
        self._sum += previous - times[0]

    @property
    def count(self) -> int:
        """Values observed so far."""
        return sum(self._counts)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The histogram at this moment."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)
