"""Where webhooks may go: what is refused on its face, and what only when its name has been resolved."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address

import httpcore2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.webhooks.addresses import check_webhook_url, is_public
from calotype.webhooks.network import AddressRefused, GuardedNetwork
from calotype_shared.errors import InvalidRequest


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hooks?token=1",
        "HTTPS://Example.COM",
        "https://example.com:8443/",
        "https://bücher.example/ü",
        "https://8.8.8.8/",
        "https://[2606:4700:4700::1111]:443/",
        "https://my_host.example/",
        "https://localhost.example.com/",
    ],
)
def test_public_addresses_pass(url: str) -> None:
    """Names, and addresses of the internet at large."""
    check_webhook_url(url, allow_private=False)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://example.com/", "https only"),
        ("ftp://example.com/", "https only"),
        ("example.com/hooks", "https only"),
        ("", "https only"),
        ("https:///hooks", "names no host"),
        ("https://a b.example/", "names no host"),
        ("https://%31%32%37.0.0.1/", "names no host"),
        ("https://127.0.0.1./", "names no host"),
        ("https://[2606:4700::1%25eth0]/", "names no host"),
        (f"https://{'y' * 64}.example/", "names no host"),
        ("https://user:word@example.com/", "user name or password"),
        ("https://example.com\\@127.0.0.1/", "user name or password"),
        ("https://example.com:22/", "port 22"),
        ("https://example.com:0/", "port 0"),
        ("https://example.com:99999/", "port 99999"),
        ("https://example.com:x/", "cannot be read"),
        ("https://exa\x00mple.com/", "cannot be read"),
        ("https://example.com/\ud800", "cannot be read"),
        ("https://0177.0.0.1/", "cannot be read"),
        ("https://１２７.０.０.１/", "cannot be read"),
        (f"https://example.com/{'y' * 2048}", "characters"),
    ],
)
def test_what_is_no_address_is_refused(url: str, problem: str) -> None:
    """Each refusal says which part is wrong."""
    with pytest.raises(InvalidRequest, match="webhook=") as refused:
        check_webhook_url(url, allow_private=False)
    assert problem in refused.value.problem
    assert refused.value.remedy


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.1", "017700000001", "0", "0.0.0.0"),
        *("10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.0.8", "224.0.0.1"),
        *("255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]"),
        *("[64:ff9b::7f00:1]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[fe80::1]", "[fc00::1]", "[fec0::1]"),
        *("[ff0e::1]", "[2001:db8::1]", "[2001:0:7f00:1::]", "127。0。0。1", "localhost", "a.localhost", "LOCALHOST"),
    ],
)
def test_private_addresses_are_refused_in_every_spelling(host: str) -> None:
    """Decimal, hexadecimal, octal, short, and wrapped in IPv6; all of them pass where private ones are allowed."""
    with pytest.raises(InvalidRequest, match="not a public address"):
        check_webhook_url(f"https://{host}/", allow_private=False)
    check_webhook_url(f"http://{host}/", allow_private=True)


def test_private_networks_are_no_excuse_for_the_rest() -> None:
    """Users, passwords and other services' ports stay refused."""
    for url, problem in (
        ("http://user:word@localhost/", "user name or password"),
        ("http://localhost:25/", "port 25"),
        ("ftp://localhost/", "https only"),
    ):
        with pytest.raises(InvalidRequest, match=problem):
            check_webhook_url(url, allow_private=True)


def test_a_refusal_keeps_secrets() -> None:
    """Neither a password nor a query is repeated in the message."""
    for url, problem in (
        ("http://user:hush@example.com/a?token=hush#hush", "https only"),
        ("https://user:hush@example.com/?hush", "user name or password"),
    ):
        with pytest.raises(InvalidRequest, match=problem) as refused:
            check_webhook_url(url, allow_private=False)
        assert "hush" not in str(refused.value)


@given(st.ip_addresses(v=4))
def test_an_address_is_judged_by_the_one_it_wraps(inner: IPv4Address) -> None:
    """Mapped, through 6to4 or NAT64: as public as the IPv4 address within."""
    number = int(inner)
    for wrapped in (0xFFFF << 32 | number, 0x2002 << 112 | number << 80, 0x64FF9B << 96 | number):
        assert is_public(IPv6Address(wrapped)) == is_public(inner)


@given(st.ip_addresses())
def test_a_public_address_is_one_by_pythons_word_too(address: IPv4Address | IPv6Address) -> None:
    """The rules here only ever take away."""
    assert address.is_global or not is_public(address)


@contextmanager
def listener() -> Iterator[tuple[int, list[str]]]:
    """A port on 127.0.0.1 and the connections that it got."""
    met: list[str] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def accept() -> None:
            while True:
                try:
                    connection, peer = server.accept()
                except OSError:
                    return
                met.append(peer[0])
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1], met
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1", "169.254.169.254", "fe80::1%2", "64:ff9b::a00:1"])
def test_a_name_that_leads_inside_is_refused(address: str) -> None:
    """Whatever the name looks like, and in any spelling that a resolver answers with, nothing is connected."""
    with listener() as (port, met):
        backend = GuardedNetwork(seconds=5, resolve=lambda _host, _port: [address, "127.0.0.1"])
        with pytest.raises(AddressRefused, match=r"hooks\.example is not a public address"):
            backend.connect_tcp("hooks.example", port)
    assert met == []


def test_it_connects_to_what_it_checked() -> None:
    """The name is resolved once; nobody asks again between the check and the connection."""
    asked = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    with listener() as (port, met):
        backend = GuardedNetwork(seconds=5, allow_private=True, resolve=resolve)
        stream = backend.connect_tcp("hooks.example", port)
        assert ip_address(stream.get_extra_info("server_addr")[0]) == ip_address("127.0.0.1")
        stream.read(1)  # the listener has met us
        stream.close()
    assert (asked, met) == (["hooks.example"], ["127.0.0.1"])


def test_the_next_address_is_tried() -> None:
    """A host whose first address is dead is reached by its second; one without an address is an ordinary failure."""
    with listener() as (port, met):
        backend = GuardedNetwork(seconds=5, allow_private=True, resolve=lambda _host, _port: ["::1", "127.0.0.1"])
        stream = backend.connect_tcp("hooks.example", port)
        stream.read(1)
        stream.close()
    assert met == ["127.0.0.1"]

    def resolve(_host: str, _port: int) -> list[str]:
        raise socket.gaierror("unknown name")

    with pytest.raises(httpcore2.ConnectError, match=r"hooks\.example has no address"):
        GuardedNetwork(seconds=5, resolve=resolve).connect_tcp("hooks.example", 443)
