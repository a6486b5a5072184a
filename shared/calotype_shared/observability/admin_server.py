"""`AdminServer`: a small HTTP server on a separate port, for scrapers, probes and autoscalers.

It has no authentication and covers the whole process and fleet. So it listens on loopback by default, and never on the
port that tenants can reach.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from calotype_shared.errors import SettingsError

log = logging.getLogger(__name__)

_SECONDS = 10.0  # for a request to arrive


@dataclass(frozen=True, kw_only=True)
class AdminRequest:
    """The parts of a request that routes use."""

    accept: str = ""
    query: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AdminResponse:
    body: bytes
    status: int = 200
    content_type: str = "text/plain; charset=utf-8"

    @classmethod
    def of(cls, value: object, *, status: int = 200) -> Self:
        """JSON."""
        return cls(body=json.dumps(value).encode(), status=status, content_type="application/json")


Route = Callable[[AdminRequest], AdminResponse]


def probed(problem: str | None) -> AdminResponse:
    """The response to a probe: 200, or 503 with the problem."""
    return AdminResponse.of({"status": problem}, status=503) if problem else AdminResponse.of({"status": "ok"})


class AdminServer:
    """Binds its port on construction; serves from `start` to `close`, one thread per request."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route], *, setting: str) -> None:
        """Raises SettingsError, which names `setting`, if the port cannot be bound."""
        try:
            self._server = _Server((host, port), _handler(routes))
        except OSError as error:
            raise SettingsError(
                f"{setting}={port}: cannot listen at {host!r} ({error.strerror}); give another port or address"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="calotype-operators", daemon=True)

    @property
    def port(self) -> int:
        """The bound port; differs from the requested one if that was 0."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own resolves the host name

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


def _handler(routes: Mapping[str, Route]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SECONDS

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            route = routes.get(parts.path)
            if route is None:
                self._send(AdminResponse.of({"error": f"there is {', '.join(routes)}"}, status=404))
                return
            try:
                asked = AdminRequest(accept=self.headers.get("Accept", ""), query=dict(parse_qsl(parts.query)))
                answer = route(asked)
            except Exception:
                log.exception("unexpected error in an admin request", extra={"path": parts.path})
                answer = AdminResponse.of({"error": "a bug; the log has the details"}, status=500)
            self._send(answer)

        def _send(self, answer: AdminResponse) -> None:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Do not log scrapes."""

    return Handler
