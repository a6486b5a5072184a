"""`Watched`: ASGI middleware that counts, times and traces requests, where somebody wants to know."""

from __future__ import annotations

import time
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calotype_shared.observability.logs import about
from calotype_shared.observability.tracing import NOOP_SPAN, Span, Telemetry, trace_id_of

_NO_ROUTE = "(none)"
_NO_ANSWER = 499  # nginx's number for a client that hung up first


class Observer(Protocol):
    """Where requests are counted; `gateway/metrics.py` has the one."""

    def request(self, *, route: str, method: str, status: int, seconds: float) -> None: ...


class RequestMetricsMiddleware:
    """Outermost, so that what the limits refuse is counted too.

    What changes something is traced, and whatever a caller traces itself; not the many looks at a job by others.
    """

    def __init__(self, app: ASGIApp, observer: Observer | None, telemetry: Telemetry) -> None:
        self._app = app
        self._observer = observer
        self._telemetry = telemetry

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

        span, method = self._begin(scope), scope["method"]
        with span, about(trace_id=trace_id_of(span.traceparent)):
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
                span.rename(f"{method} {route}")
                span.set(**{"http.request.method": method, "http.route": route, "http.response.status_code": status})
                if status >= 500:
                    span.fail(str(status))

    def _begin(self, scope: Scope) -> Span:
        parent = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1")
        if scope["method"] in ("GET", "HEAD") and not parent:
            return NOOP_SPAN
        return self._telemetry.begin(scope["method"], kind="server", parent=parent)


def route_of(scope: Scope) -> str:
    """The template of the route that a request went to."""
    return str(getattr(scope.get("route"), "path", _NO_ROUTE))
