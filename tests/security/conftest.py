"""A gateway with keys and short time-outs, for the attacks of one file."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

from calotype.api_keys import Scope
from calotype.embedded import EmbeddedServers
from calotype.testing import demo_card
from calotype_shared.queue.job_store import JobStore
from calotype_shared.settings import Settings
from tests.integration.gateway import Gateway, own_settings

Raw = Callable[..., bytes]


@pytest.fixture(scope="module")
def corner(servers: EmbeddedServers) -> Settings:
    """Settings of a queue with one announced model and no worker."""
    settings = own_settings(servers)
    with Redis.from_url(settings.redis_url, decode_responses=True) as redis:
        JobStore(redis, key_prefix=settings.key_prefix).announce_model(demo_card())
    return settings


@pytest.fixture(scope="module")
def guarded(corner: Settings) -> Iterator[Gateway]:
    """Wants keys; at most two requests of a tenant may wait for images, and three of all."""
    gateway = Gateway(corner, auth="keys", dispatch=False, max_waiting=3, max_waiting_per_tenant=2, max_wait_seconds=60)
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def key(guarded: Gateway) -> Callable[[str], dict[str, str]]:
    """The headers of a tenant's key."""

    def headers(tenant: str, **options: Any) -> dict[str, str]:
        scopes = options.pop("scopes", list(Scope))
        token, _ = guarded.app.state.services.keys.create(name="test", tenant=tenant, scopes=scopes, **options)
        return {"authorization": f"Bearer {token}"}

    return headers


class Connection:
    """A TCP connection to a gateway, written by hand."""

    def __init__(self, gateway: Gateway) -> None:
        self.socket = socket.create_connection(("127.0.0.1", gateway.port), timeout=60)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def head(self, method: str, path: str, headers: dict[str, str] | None = None) -> None:
        lines = [f"{method} {path} HTTP/1.1", "host: localhost"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def answer(self) -> bytes:
        """The first bytes of the response; empty if the connection was closed without one."""
        try:
            return self.socket.recv(65_536)
        except ConnectionResetError:  # closed before all of what was sent had been read
            return b""


def until(check: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
