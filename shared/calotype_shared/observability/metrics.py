"""The metrics of `metric_names` as prometheus-client objects. Imported only if metrics are enabled."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from calotype_shared.observability.admin_server import AdminRequest, AdminResponse
from calotype_shared.observability.metric_names import Metric

Family = CounterMetricFamily | GaugeMetricFamily


def new_registry() -> CollectorRegistry:
    """An empty registry. Disables the `_created` series in this process, which would double the number of series."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry()


def histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(metric.name, metric.text, metric.labels, buckets=metric.buckets, registry=registry)


def counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    """A counter that starts with all values of its label, so that rates exist before the first event."""
    made = Counter(metric.name, metric.text, metric.labels, registry=registry)
    for value in metric.values:
        made.labels(value)
    return made


def family(metric: Metric, values: float | Mapping[tuple[str, ...], float]) -> Family:
    """A counter or gauge with its present value, or with a value per combination of labels."""
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made = kind(metric.name, metric.text, labels=metric.labels)
    for labels, value in (values if isinstance(values, Mapping) else {(): values}).items():
        made.add_metric(labels, value)
    return made


def scraped(registry: CollectorRegistry, asked: AdminRequest) -> AdminResponse:
    """The response of `/metrics`, in the format that the scraper prefers."""
    encode, content_type = choose_encoder(asked.accept)
    return AdminResponse(body=encode(registry), content_type=content_type)
