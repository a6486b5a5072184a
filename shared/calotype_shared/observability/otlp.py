"""`export_spans`: sets up OpenTelemetry's SDK to send spans by OTLP over HTTP, by OpenTelemetry's variables."""

from __future__ import annotations

import threading

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from calotype_shared.observability.tracing import TRACER_NAME, Telemetry

_CLOSE_SECONDS = 3.0  # an unreachable collector must not keep a process from ending


def export_spans(*, service: str, exporter: SpanExporter | None = None) -> Telemetry:
    """Sends spans to `exporter` from a separate thread, in batches. Spans beyond the queue's capacity are dropped.

    `service` names the source of the spans, unless `OTEL_SERVICE_NAME` does. The provider is not the global one:
    that belongs to the application.
    """
    resource = Resource.create({SERVICE_NAME: service}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))

    def close() -> None:
        closing = threading.Thread(target=provider.shutdown, name="calotype-telemetry", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    return Telemetry(tracer=provider.get_tracer(TRACER_NAME), close=close)
