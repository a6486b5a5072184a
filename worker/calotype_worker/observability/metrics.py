"""A worker's `/metrics`: spans as histograms, everything else read when scraped.

The step loop is independent of it: it records spans, as for a trace, and keeps its own counters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.registry import Collector

from calotype_shared.observability import metric_names as names
from calotype_shared.observability.metrics import Family, family, histogram
from calotype_worker.engine.stats import EngineStats
from calotype_worker.observability.counters import Counters

_TALLIED = (names.ATTEMPTS, names.LEASE_RENEWALS, names.LOST_CLAIMS, names.FENCED_COMMITS, names.LEASE_REAPS,
            names.GAP_REPUBLISH)  # fmt: skip


class SpanMeters:
    """A `Tracer` that observes durations. Costs one or two microseconds per span. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, models: Iterable[str]) -> None:
        rows, steps = histogram(names.BATCH_ROWS, registry), histogram(names.STEP_SECONDS, registry)
        runs = histogram(names.RUN_SECONDS, registry)
        self._by_model = {model: (rows.labels(model), steps.labels(model), runs.labels(model)) for model in models}
        self._engine = {
            "encode": histogram(names.ENCODE_SECONDS, registry),
            "decode": histogram(names.DECODE_SECONDS, registry),
        }
        self._jobs: Mapping[str, Histogram] = {
            "fetch": histogram(names.FETCH_SECONDS, registry),
            "prepare": histogram(names.PREPARE_SECONDS, registry),
            "encode": histogram(names.ENCODE_IMAGE_SECONDS, registry),
            "upload": histogram(names.UPLOAD_SECONDS, registry),
            "commit": histogram(names.COMMIT_SECONDS, registry),
        }
        self._waits = histogram(names.ADMISSION_WAIT_SECONDS, registry)

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        if track != "engine":  # a thread's own: the phase, then the thread's name
            self._jobs[track.partition(" ")[0]].observe(ended - began)
        elif name in self._engine:
            self._engine[name].observe(ended - began)
        elif "rows" in facts:
            rows, seconds, _ = self._by_model[facts["model"]]
            rows.observe(facts["rows"])
            seconds.observe(ended - began)
        elif "model" in facts:
            self._by_model[facts["model"]][2].observe(ended - began)

    def wait(self, name: str, identity: str, began: float, ended: float) -> None:
        self._waits.observe(ended - began)


class WorkerCollector(Collector):
    """Reads the worker's counters when scraped, so that counting has no additional cost."""

    def __init__(
        self,
        *,
        info: Mapping[str, str],
        device: torch.device,
        stats: Callable[[], EngineStats],
        merge_patterns: Callable[[], Mapping[tuple[str, ...], float]],
        counters: Counters,
        gauges: Mapping[names.Metric, Callable[[], float]],
    ) -> None:
        self._info = tuple(info[label] for label in names.WORKER_INFO.labels)
        self._device = device
        self._stats = stats
        self._merge_patterns = merge_patterns
        self._counters = counters
        self._gauges = gauges

    def collect(self) -> Iterable[Family]:
        stats = self._stats()
        outcomes = {"succeeded": stats.images, "failed": stats.failed, "cancelled": stats.cancelled}
        phases = {
            "encode": stats.encode_seconds,
            "step": stats.step_seconds,
            "decode": stats.decode_seconds,
            "idle": stats.idle_seconds,
        }
        yield family(names.WORKER_INFO, {self._info: 1})
        yield family(names.PADDING_ROWS, stats.padding_rows)
        yield family(names.OUT_OF_MEMORY, stats.out_of_memory)
        yield family(names.MERGE_PATTERNS, self._merge_patterns())
        yield family(names.INFLIGHT_REQUESTS, stats.in_flight)
        yield family(names.IMAGES, _by_label(outcomes))
        yield family(names.ENGINE_SECONDS, _by_label(phases))
        yield family(names.DEVICE_MEMORY_BYTES, _by_label(_memory(self._device)))
        for metric in _TALLIED:
            yield family(metric, self._counters.counted(metric))
        for metric, read in self._gauges.items():
            yield family(metric, read())


def _by_label(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(name,): value for name, value in values.items()}


def _memory(device: torch.device) -> dict[str, float]:
    """Memory in bytes; for a CPU, as Linux counts it. Empty if unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"total": total, "used": total - free, "allocated": torch.cuda.memory_allocated(device)}
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        said = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        resident = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return {}
    total = int(said["MemTotal:"]) * 1024
    return {"total": total, "used": total - int(said["MemAvailable:"]) * 1024, "allocated": resident * page}
