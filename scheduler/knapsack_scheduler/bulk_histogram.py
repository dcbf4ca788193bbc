"""A Prometheus histogram that takes many observations at once.

One allocation observes the size of every group of a batch. One by one that is thousands of
calls on the event loop; as an array it is one search and one addition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from knapsack_scheduler.core.problem import IntArray


class BulkHistogram(Collector):
    """Histogram of whole numbers, by the value of one label."""

    def __init__(
        self,
        name: str,
        text: str,
        label: str,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        """Register a histogram with these upper bounds, ascending, +Inf not among them."""
        self._name, self._text, self._label = name, text, label
        self._bounds = np.array(buckets, np.float64)
        self._counts: dict[str, IntArray] = {}
        self._sums: dict[str, int] = {}
        registry.register(self)

    def observe(self, value: str, numbers: IntArray) -> None:
        """Count every number under a value of the label."""
        place = np.searchsorted(self._bounds, numbers)
        counts = np.bincount(place, minlength=self._bounds.size + 1)
        before = self._counts.get(value)
        self._counts[value] = counts if before is None else before + counts
        self._sums[value] = self._sums.get(value, 0) + int(numbers.sum())

    def remove(self, value: str) -> None:
        """Forget a value of the label; one never seen is no error."""
        self._counts.pop(value, None)
        self._sums.pop(value, None)

    def collect(self) -> Iterable[Metric]:
        """Return the histogram as Prometheus wants it: cumulative counts."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        bounds = (*self._bounds.tolist(), float("inf"))
        names = [floatToGoString(bound) for bound in bounds]  # type: ignore[no-untyped-call]
        # Copied first: a scrape may come between two observations.
        for value, counts in list(self._counts.items()):
            cumulative = np.cumsum(counts).tolist()
            rows = list(zip(names, cumulative, strict=True))
            family.add_metric([value], rows, self._sums.get(value, 0))
        return [family]
