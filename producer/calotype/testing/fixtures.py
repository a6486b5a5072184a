"""Fixtures for pytest. In `conftest.py`: `pytest_plugins = ["calotype.testing.fixtures"]`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from calotype.client import Client
from calotype.embedded import EmbeddedServers
from calotype.testing.sandbox import Sandbox


@pytest.fixture(scope="session")
def calotype_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServers]:
    """A real Valkey and a real S3 server, started once per run."""
    with EmbeddedServers.start(tmp_path_factory.mktemp("calotype")) as servers:
        yield servers


@pytest.fixture
def calotype_sandbox(calotype_servers: EmbeddedServers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """An empty sandbox, to which `CALOTYPE_*` variables point during the test: `Client()` finds it."""
    for name in [name for name in os.environ if name.startswith("CALOTYPE_")]:
        monkeypatch.delenv(name)
    with Sandbox(servers=calotype_servers) as sandbox:
        for name, value in sandbox.environment.items():
            monkeypatch.setenv(name, value)
        yield sandbox


@pytest.fixture
def calotype_client(calotype_sandbox: Sandbox) -> Client:
    """A client of the sandbox."""
    return calotype_sandbox.client
