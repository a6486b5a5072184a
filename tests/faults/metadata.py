"""A metadata service on loopback that speaks each cloud's protocol as strictly as the clouds do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "AQAEAtoken=="
MACHINE = "vmss_7"


class MetadataService:
    """`notice` is what it says about this machine, in the words of the cloud; None: it stays."""

    def __init__(self, cloud: str, port: int) -> None:
        self.cloud = cloud
        self.endpoint = f"http://127.0.0.1:{port}"
        self.notice: Any = None
        self.refused: list[str] = []

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, str]:
        found: tuple[int, str] = getattr(self, f"_{self.cloud}")(method, path, headers)
        if found[0] not in (200, 404):
            self.refused.append(f"{method} {path}: {found}")
        return found

    def _aws(self, method: str, path: str, headers: Any) -> tuple[int, str]:
        if path == "/latest/api/token":
            lifetime = headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if method != "PUT" or not lifetime.isdigit() or not 1 <= int(lifetime) <= 21600:
                return 400, "Bad Request"
            return 200, TOKEN
        if method != "GET" or headers.get("X-aws-ec2-metadata-token") != TOKEN:
            return 401, "Unauthorized"
        if path == "/latest/meta-data/events/recommendations/rebalance":
            return 200, json.dumps({"noticeTime": "2020-10-27T08:22:00Z"})
        if path != "/latest/meta-data/spot/instance-action" or self.notice is None:
            return 404, "Not Found"
        return 200, json.dumps(self.notice)

    def _gcp(self, method: str, path: str, headers: Any) -> tuple[int, str]:
        if method != "GET" or headers.get("Metadata-Flavor") != "Google":
            return 403, "Forbidden"
        if path != "/computeMetadata/v1/instance/preempted":
            return 404, "Not Found"
        return 200, "TRUE" if self.notice else "FALSE"

    def _azure(self, method: str, path: str, headers: Any) -> tuple[int, str]:
        if method != "GET" or headers.get("Metadata") != "true" or "api-version=" not in path:
            return 400, "Bad request"
        if path.startswith("/metadata/instance/compute/name?") and "format=text" in path:
            return 200, MACHINE
        if not path.startswith("/metadata/scheduledevents?"):
            return 404, "Not Found"
        return 200, json.dumps({"DocumentIncarnation": 1, "Events": self.notice or []})


@contextmanager
def metadata_service(cloud: str) -> Iterator[MetadataService]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            status, body = service.answer(self.command, self.path, self.headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST = _serve

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service = MetadataService(cloud, server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
