"""`Sender`: one HTTP POST to an untrusted address, with a strict time limit whatever the receiver does.

It uses httpcore2 directly, one connection per message: httpx2 would log whole addresses and read proxies from the
environment. Redirects are not followed, and only the head of a response is read.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpcore2
import httpx2

from calotype.webhooks.addresses import check_webhook_url
from calotype.webhooks.network import GuardedNetwork, Resolver, resolve_host


@dataclass(frozen=True, kw_only=True)
class Response:
    """The receiver's response. `retry_after` is in seconds; 0 if not given."""

    status: int
    retry_after: float

    @property
    def delivered(self) -> bool:
        return 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Whether the receiver wants no more deliveries (HTTP 410)."""
        return self.status == 410


class Sender:
    """Posts to untrusted addresses. Thread-safe: it holds no connection.

    `timeout`, in seconds, covers everything except resolving the name: connecting, writing, and reading the head.
    """

    def __init__(
        self,
        *,
        allow_private: bool = False,
        timeout: float = 10.0,
        resolve: Resolver = resolve_host,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allow_private = allow_private
        self._timeout = timeout
        self._resolve = resolve
        self._tls = tls or httpx2.create_ssl_context()

    def post(self, url: str, *, headers: Mapping[str, str], body: bytes) -> Response:
        """Send it once.

        Raises:
            InvalidRequest: webhooks may not call this address.
            httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError: there was no response.
        """
        check_webhook_url(url, allow_private=self._allow_private)
        parts = httpx2.URL(url)
        where = httpcore2.URL(scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path)
        network = GuardedNetwork(seconds=self._timeout, allow_private=self._allow_private, resolve=self._resolve)
        sent = [("host", parts.netloc.decode()), *headers.items()]
        with (
            httpcore2.HTTPConnection(where.origin, ssl_context=self._tls, network_backend=network) as connection,
            connection.stream("POST", where, headers=sent, content=body) as response,
        ):
            heads = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            return Response(status=response.status, retry_after=_seconds(heads.get(b"retry-after", "")))


def _seconds(retry_after: str) -> float:
    """Parse both forms of the header: seconds or a date. 0 if missing, past or invalid."""
    try:
        if retry_after.isdecimal():
            return float(retry_after)
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
