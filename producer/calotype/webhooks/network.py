"""`GuardedNetwork`: connections to public addresses only, which all end at one deadline.

A host's name is resolved at the moment of sending, and the connection goes to exactly the address that was checked, so
changing the name's address in between (DNS rebinding) has no effect. The deadline covers the whole exchange: a receiver
that sends byte by byte cannot extend it, as it could with a timeout per read.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from ipaddress import ip_address

import httpcore2

from calotype.webhooks.addresses import is_public

_MOST_ADDRESSES = 4  # of one host that are tried
_READ_BYTES = 4_096  # per read, so no more than this of a body
_WRITE_BYTES = 16_384  # per write, so that the deadline is checked in between

Resolver = Callable[[str, int], Sequence[str]]  # (host, port) -> its IP addresses


class AddressRefused(httpcore2.ConnectError):
    """A host's name resolves only to addresses that webhooks may not call."""


def resolve_host(host: str, port: int) -> Sequence[str]:
    """The system's answer, best first. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class GuardedNetwork(httpcore2.NetworkBackend):
    """The network of one exchange, limited to `seconds` from construction. Belongs to one thread.

    The deadline cannot interrupt the resolution of a name, but the time for it counts.
    """

    def __init__(self, *, seconds: float, allow_private: bool = False, resolve: Resolver = resolve_host) -> None:
        self._seconds = seconds
        self._ends = time.monotonic() + seconds
        self._allow_private = allow_private
        self._resolve = resolve
        self._network = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """A connection to the first address of the host that responds. They share the remaining time evenly.

        Raises:
            AddressRefused: none of them is public.
            httpcore2.ConnectError, httpcore2.ConnectTimeout: the host does not exist, or no address responds.
        """

        def connect(address: str, share: float) -> httpcore2.NetworkStream:
            return _Stream(self._network.connect_tcp(address, port, share, local_address, socket_options), self.left)

        addresses = self._allowed(host, port)[:_MOST_ADDRESSES]
        share = self.left(httpcore2.ConnectTimeout) / len(addresses)
        for address in addresses[:-1]:
            with suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout):
                return connect(address, share)
        return connect(addresses[-1], share)

    def left(self, error: type[Exception]) -> float:
        """Remaining seconds; raises `error` if there are none."""
        left = self._ends - time.monotonic()
        if left <= 0:
            raise error(f"no answer within {self._seconds:g} s")
        return left

    def _allowed(self, host: str, port: int) -> list[str]:
        try:
            found = self._resolve(host, port)
        except OSError as error:
            raise httpcore2.ConnectError(f"{host} has no address ({error})") from error
        allowed = [address for address in found if self._allow_private or is_public(ip_address(address))]
        if not allowed:
            raise AddressRefused(f"{host} is not a public address: {', '.join(found)}")
        return allowed


class _Stream(httpcore2.NetworkStream):
    """A connection in which each operation may take the exchange's remaining time."""

    def __init__(self, stream: httpcore2.NetworkStream, left: Callable[[type[Exception]], float]) -> None:
        self._stream = stream
        self._left = left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(min(max_bytes, _READ_BYTES), self._left(httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _WRITE_BYTES):
            part = buffer[start : start + _WRITE_BYTES]
            self._stream.write(part, self._left(httpcore2.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = self._left(httpcore2.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._left)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)
