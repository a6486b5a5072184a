"""Metrics of the vocabulary as prometheus-client's own objects. Imported only where metrics are switched on."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from calotype_shared.observability.admin_server import AdminRequest, AdminResponse
from calotype_shared.observability.metric_names import Metric

Family = CounterMetricFamily | GaugeMetricFamily


def new_registry() -> CollectorRegistry:
    """An empty one. Switches `_created` series off in this process: one more for each other, and nobody reads them."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry()


def histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(metric.name, metric.text, metric.labels, buckets=metric.buckets, registry=registry)


def counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    """One that starts with all values its label can have, so that a rate is there before the first event."""
    made = Counter(metric.name, metric.text, metric.labels, registry=registry)
    for value in metric.values:
        made.labels(value)
    return made


def family(metric: Metric, values: float | Mapping[tuple[str, ...], float]) -> Family:
    """A counter or gauge as it is at this moment: one number, or a number for the values of its labels."""
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made = kind(metric.name, metric.text, labels=metric.labels)
    for labels, value in (values if isinstance(values, Mapping) else {(): values}).items():
        made.add_metric(labels, value)
    return made


def scraped(registry: CollectorRegistry, asked: AdminRequest) -> AdminResponse:
    """What `/metrics` answers, in the format that the scraper prefers."""
    encode, content_type = choose_encoder(asked.accept)
    return AdminResponse(body=encode(registry), content_type=content_type)
