"""Which addresses webhooks may call: public ones, never the operator's own network.

An address is checked twice. `check_webhook_url` refuses visibly invalid ones when a job is submitted.
`GuardedNetwork` (network.py) checks what the host's name resolves to at the moment of sending.
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpx2

from calotype_shared.errors import InvalidRequest

MAX_URL_CHARACTERS = 2_048

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")

# Networks that `is_global` of some Python versions considers public.
_SPECIAL_IPV4 = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"))
_IPV6_UNICAST = IPv6Network("2000::/3")  # all that has been allocated, RFC 4291
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address

Address = IPv4Address | IPv6Address


def check_webhook_url(url: str, *, allow_private: bool) -> None:
    """Refuse an invalid webhook address. `allow_private` permits plain HTTP and private hosts.

    Raises:
        InvalidRequest: names the invalid part and what is valid.
    """
    try:
        parts = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        raise _refusal(url, "cannot be read", "use an address such as https://example.com/hooks") from None
    host = parts.raw_host.decode()
    literal = literal_address(host)
    for wrong, problem, remedy in (
        (
            len(url) > MAX_URL_CHARACTERS,
            f"has {len(url)} characters",
            f"use one of at most {MAX_URL_CHARACTERS}",
        ),
        (
            parts.scheme not in (("https", "http") if allow_private else ("https",)),
            "webhooks go to https only",
            "use an address that begins with https://",
        ),
        (
            "%" in host or (literal is None and not _NAME.fullmatch(host)),
            "names no host",
            "use an address such as https://example.com/hooks",
        ),
        (
            bool(parts.userinfo),
            "holds a user name or password",
            "leave it out; webhooks are signed, so that the receiver can tell whose they are",
        ),
        (
            parts.port is not None and not (parts.port in (80, 443) or 1_024 <= parts.port <= 65_535),
            f"port {parts.port} belongs to another service",
            "use 443, or one of 1024 to 65535",
        ),
        (
            not allow_private and (_is_localhost(host) or (literal is not None and not is_public(literal))),
            f"{host} is not a public address",
            "use a host that can be reached from the internet",
        ),
    ):
        if wrong:
            raise _refusal(url, problem, remedy)


def _refusal(url: str, problem: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(problem, field="webhook", value=without_secrets(url), remedy=remedy)


def without_secrets(url: str) -> str:
    """The address for logs: without user, password, query and fragment."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])


def literal_address(host: str) -> Address | None:
    """The host's IP address in any spelling that a C library accepts (`127.1`, `0x7f000001`); None for a name."""
    with suppress(ValueError):
        return ip_address(host)
    with suppress(OSError):
        return IPv4Address(socket.inet_aton(host))
    return None


def is_public(address: Address) -> bool:
    """Whether an address is public, including any IPv4 address embedded in it."""
    if isinstance(address, IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour or _behind_nat64(address)
        if wrapped is not None:
            return is_public(wrapped)
        return address.is_global and address in _IPV6_UNICAST
    return address.is_global and not address.is_multicast and not any(address in net for net in _SPECIAL_IPV4)


def _behind_nat64(address: IPv6Address) -> IPv4Address | None:
    return IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None


def _is_localhost(host: str) -> bool:
    return host.rpartition(".")[2] == "localhost"
