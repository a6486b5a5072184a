"""`Sender`: one HTTP POST to an untrusted address, over within a given time whatever the other side does.

It speaks through httpcore itself, one connection a message: httpx would log whole addresses and read proxies from the
environment. Redirects are answers like any other, and of an answer only its head is read.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpcore
import httpx

from calotype.webhooks.addresses import GuardedBackend, Resolver, check_webhook_url, resolve_host

_READ_BYTES = 4_096  # at a time, so no more than this of a body
_WRITE_BYTES = 16_384


@dataclass(frozen=True, kw_only=True)
class Response:
    """What the receiver said. `retry_after` is in seconds; 0 if it did not say."""

    status: int
    retry_after: float

    @property
    def delivered(self) -> bool:
        return 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Whether it wants no more of this, by HTTP's word for it."""
        return self.status == 410


class Sender:
    """Posts to addresses that strangers chose. Thread-safe: it holds no connection.

    `timeout` is seconds for all of it but the name's resolution: connecting, writing, and reading the answer's head.
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
        self._tls = tls or httpx.create_ssl_context()

    def post(self, url: str, *, headers: Mapping[str, str], body: bytes) -> Response:
        """Send it once.

        Raises:
            InvalidRequest: the address is none that webhooks go to.
            httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError: there was no answer.
        """
        check_webhook_url(url, allow_private=self._allow_private)
        parts = httpx.URL(url)
        where = httpcore.URL(scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path)
        network = _InTime(GuardedBackend(allow_private=self._allow_private, resolve=self._resolve), self._timeout)
        sent = [("host", parts.netloc.decode()), *headers.items()]
        with (
            httpcore.HTTPConnection(where.origin, ssl_context=self._tls, network_backend=network) as connection,
            connection.stream("POST", where, headers=sent, content=body) as response,
        ):
            heads = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            return Response(status=response.status, retry_after=_seconds(heads.get(b"retry-after", "")))


def _seconds(retry_after: str) -> float:
    """Both spellings of the header: seconds, or a date. 0 for none, the past, and what makes no sense."""
    try:
        if retry_after.isdecimal():
            return float(retry_after)
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


class _Deadline:
    """A moment that all parts of one exchange share."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def left(self, error: type[Exception]) -> float:
        """Seconds left; raises `error` when there are none."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise error(f"no answer within {self._seconds:g} s")
        return left


class _InTime(httpcore.NetworkBackend):
    """A network whose connections end at one deadline: a receiver that drips bytes gains nothing by each of them."""

    def __init__(self, network: httpcore.NetworkBackend, seconds: float) -> None:
        self._network = network
        self._deadline = _Deadline(seconds)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(httpcore.ConnectTimeout)
        return _Stream(self._network.connect_tcp(host, port, left, local_address, socket_options), self._deadline)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(min(max_bytes, _READ_BYTES), self._deadline.left(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _WRITE_BYTES):
            part = buffer[start : start + _WRITE_BYTES]
            self._stream.write(part, self._deadline.left(httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)
