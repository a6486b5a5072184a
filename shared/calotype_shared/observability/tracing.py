"""Spans of OpenTelemetry, from an HTTP request to the upload. Without OpenTelemetry's SDK they are no-ops.

A span's `traceparent` (W3C Trace Context) travels in the job's record, so that the worker's spans join the trace of
the client that submitted it. No span holds a prompt, or anything else of a config but the model's name and sizes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from calotype_shared.errors import SettingsError

if TYPE_CHECKING:
    from calotype_shared.settings import Settings

log = logging.getLogger(__name__)

TRACER_NAME = "calotype"

_REMEDY = "run: pip install 'calotype[telemetry]'"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """Where a process's spans begin, and what sends the last of them when it ends."""

    tracer: trace.Tracer = trace.NoOpTracer()  # noqa: RUF009 - it has no state
    close: Callable[[], None] = lambda: None


def make_telemetry(settings: Settings, *, service: str) -> Telemetry:
    """What `CALOTYPE_TELEMETRY` asks for. An application that has set up OpenTelemetry itself keeps its own setup.

    Raises:
        SettingsError: it is `on`, and the SDK's packages are missing.
    """
    if settings.telemetry == "off":
        return Telemetry()
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return Telemetry(tracer=trace.get_tracer(TRACER_NAME))
    if settings.telemetry == "auto" and not _names_a_collector():
        return Telemetry(tracer=trace.get_tracer(TRACER_NAME))  # no-op until the application sets a provider
    try:
        from calotype_shared.observability.otlp import export_spans  # noqa: PLC0415 - an extra
    except ImportError as error:
        if settings.telemetry == "on":
            raise SettingsError(f"CALOTYPE_TELEMETRY='on': {error.name} is missing; {_REMEDY}") from None
        log.warning("tracing is disabled", extra={"reason": f"{error.name} is missing", "remedy": _REMEDY})
        return Telemetry()
    return export_spans(service=service)


def _names_a_collector() -> bool:
    """Whether OpenTelemetry's own variables do."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not disabled and any(os.environ.get(name) for name in _ENDPOINTS)


@contextmanager
def span_block(
    tracer: trace.Tracer,
    name: str,
    *,
    within: Context | None = None,
    kind: trace.SpanKind = trace.SpanKind.INTERNAL,
    attributes: Mapping[str, str | int | float | bool] | None = None,
) -> Iterator[trace.Span]:
    """A span that is current in the block and ends with it; `within` is the current context unless given.

    An exception is recorded by its type only: its message may quote a prompt.
    """
    span = tracer.start_span(name, within, kind=kind, attributes=attributes)
    with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield span
        except BaseException as error:
            mark_failed(span, type(error).__name__)
            raise


def mark_failed(span: trace.Span, problem: str) -> None:
    """`problem` is an error's type or code, never its message."""
    span.set_status(trace.Status(trace.StatusCode.ERROR, problem))


def context_of(traceparent: str) -> Context:
    """The context of a remote span; an empty one if `traceparent` is malformed."""
    return _propagator.extract({"traceparent": traceparent}, Context())


def traceparent_of(span: trace.Span) -> str | None:
    """What to hand on to others; None if the span belongs to no trace."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span, Context()))
    return carrier.get("traceparent")


def trace_id_of(span: trace.Span) -> str | None:
    """32 hexadecimal digits; None if the span belongs to no trace."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None
