"""`Counters`: counts events of the threads around the engine, since the worker's start."""

from __future__ import annotations

import threading
from collections import Counter

from calotype_shared.observability.metric_names import Metric


class Counters:
    """For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Metric, str]] = Counter()

    def count(self, metric: Metric, value: str = "", *, by: int = 1) -> None:
        """Add to a counter. `value` is the value of the metric's label, if it has one."""
        with self._lock:
            self._counts[metric, value] += by

    def counted(self, metric: Metric) -> dict[tuple[str, ...], float]:
        """By the values of the metric's label."""
        with self._lock:
            if not metric.labels:
                return {(): self._counts[metric, ""]}
            return {(value,): self._counts[metric, value] for value in metric.values}
