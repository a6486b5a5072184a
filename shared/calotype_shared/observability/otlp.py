"""`Otlp`: the `Telemetry` that sends spans to a collector by OTLP over HTTP, as OpenTelemetry's own variables say.

An application that has set up OpenTelemetry itself keeps it: then spans go where its own go.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from calotype_shared.observability.tracing import Attribute, Kind, Span

_CLOSE_SECONDS = 3.0  # a collector that is away must not keep a process from ending
_KINDS = {
    "server": trace.SpanKind.SERVER,
    "producer": trace.SpanKind.PRODUCER,
    "consumer": trace.SpanKind.CONSUMER,
    "internal": trace.SpanKind.INTERNAL,
}
_propagator = TraceContextTextMapPropagator()


class OtlpSpan:
    """A span of OpenTelemetry's. Belongs to one thread at a time."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self._current: AbstractContextManager[trace.Span] | None = None

    @property
    def traceparent(self) -> str | None:
        said = self._span.get_span_context()
        return f"00-{said.trace_id:032x}-{said.span_id:016x}-{said.trace_flags:02x}"

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes(_named(attributes))

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def child(self, name: str, **attributes: Attribute) -> AbstractContextManager[object]:
        return self._tracer.start_as_current_span(name, self._context, attributes=_named(attributes))

    def note(self, name: str, began: float, ended: float, **attributes: Attribute) -> None:
        start, end = int(began * 1e9), int(ended * 1e9)
        self._tracer.start_span(name, self._context, attributes=_named(attributes), start_time=start).end(end)

    def fail(self, problem: str) -> None:
        self._span.set_status(Status(StatusCode.ERROR, problem))

    def end(self) -> None:
        self._span.end()

    @property
    def _context(self) -> context.Context:
        return trace.set_span_in_context(self._span, context.Context())

    def __enter__(self) -> Self:
        self._current = trace.use_span(self._span, record_exception=False, set_status_on_exception=False)
        self._current.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._current is not None
        self._current.__exit__(None, None, None)
        if kind is not None:
            self.fail(kind.__name__)
        self.end()


class Otlp:
    """Sends from a thread of its own, a batch at a time; what does not fit its queue is dropped."""

    def __init__(self, *, service: str, exporter: SpanExporter | None = None) -> None:
        """`service` is what the spans are of, unless `OTEL_SERVICE_NAME` says otherwise."""
        theirs = trace.get_tracer_provider()
        self._own: TracerProvider | None = None
        if isinstance(theirs, TracerProvider) and exporter is None:
            self._tracer = theirs.get_tracer("calotype")
            return
        resource = Resource.create({SERVICE_NAME: service}).merge(OTELResourceDetector().detect())
        self._own = TracerProvider(resource=resource)
        self._own.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._own.get_tracer("calotype")

    def begin(self, name: str, *, kind: Kind, parent: str | None = None, **attributes: Attribute) -> Span:
        where = _propagator.extract({"traceparent": parent}, context.Context()) if parent is not None else None
        return OtlpSpan(
            self._tracer, self._tracer.start_span(name, where, kind=_KINDS[kind], attributes=_named(attributes))
        )

    def close(self) -> None:
        if self._own is None:
            return
        closing = threading.Thread(target=self._own.shutdown, name="calotype-telemetry", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


def _named(attributes: dict[str, Attribute]) -> dict[str, Attribute]:
    """Ours in a room of their own."""
    return {name if "." in name else f"calotype.{name}": value for name, value in attributes.items()}
