"""`RequestMetricsMiddleware`: ASGI middleware that counts, times and traces requests."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Tracer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calotype_shared.observability.logs import about
from calotype_shared.observability.tracing import context_of, mark_failed, span_block, trace_id_of

_NO_ROUTE = "(none)"
_NO_ANSWER = 499  # nginx's number for a client that hung up first


class Observer(Protocol):
    """Counts requests; implemented in `gateway/metrics.py`."""

    def request(self, *, route: str, method: str, status: int, seconds: float) -> None: ...


class RequestMetricsMiddleware:
    """Outermost middleware, so that requests refused by the limits are counted too.

    Traces requests that change something, and requests whose caller traces them; not other polling.
    """

    def __init__(self, app: ASGIApp, observer: Observer | None, tracer: Tracer) -> None:
        self._app = app
        self._observer = observer
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), _NO_ANSWER

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"]
        with self._span(scope) as span, about(trace_id=trace_id_of(span)):
            try:
                await self._app(scope, receive, answered)
            except Exception:
                status = 500  # answered outside of all middleware
                raise
            finally:
                route = route_of(scope)
                if self._observer is not None:
                    self._observer.request(
                        route=route, method=method, status=status, seconds=time.perf_counter() - began
                    )
                span.update_name(f"{method} {route}")
                span.set_attributes(
                    {"http.request.method": method, "http.route": route, "http.response.status_code": status}
                )
                if status >= 500:
                    mark_failed(span, str(status))

    def _span(self, scope: Scope) -> AbstractContextManager[Span]:
        parent = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1")
        if scope["method"] in ("GET", "HEAD") and not parent:
            return nullcontext(INVALID_SPAN)
        return span_block(self._tracer, scope["method"], within=context_of(parent), kind=SpanKind.SERVER)


def route_of(scope: Scope) -> str:
    """The template of the request's route."""
    return str(getattr(scope.get("route"), "path", _NO_ROUTE))
