"""Spans of OpenTelemetry, from an HTTP request to the upload. Without OpenTelemetry's SDK they are no-ops.

A span's `traceparent` (W3C Trace Context) travels in the job's record, so that the worker's spans join the trace of
the client that submitted it. No span holds a prompt, or anything else of a config but the model's name and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACER_NAME = "calotype"

_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """Begins a process's spans, and sends the remaining ones when the process ends."""

    tracer: trace.Tracer = trace.NoOpTracer()  # noqa: RUF009 - it has no state
    close: Callable[[], None] = lambda: None


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

    An exception is recorded by its type only, because its message can contain a prompt.
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
    """The `traceparent` to pass on; None if the span belongs to no trace."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span, Context()))
    return carrier.get("traceparent")


def trace_id_of(span: trace.Span) -> str | None:
    """32 hexadecimal digits; None if the span belongs to no trace."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None
