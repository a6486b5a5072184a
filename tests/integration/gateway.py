"""A real gateway on a free port, with a worker on the tiny model behind it, for the tests of one file."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from pydantic import SecretStr

from calotype import Client, Settings
from calotype.embedded import EmbeddedServers
from calotype.gateway.app import create_app
from calotype.gateway.server import server_config
from calotype.gateway.settings import GatewaySettings
from calotype_shared.storage.s3 import Storage
from tests.faults.harness import Forge
from tests.integration.conftest import until


def own_settings(servers: EmbeddedServers) -> Settings:
    """A corner of the shared servers that no other test uses."""
    name = uuid.uuid4().hex[:12]
    settings = servers.settings(key_prefix=f"test-{name}:", s3_bucket=f"test-{name}")
    Storage(settings).check(create=True)
    return settings


class Gateway:
    """Serves in a thread. `http` is a client for it; `client` speaks to the same queue directly."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        self.settings = settings
        config = GatewaySettings(**{"port": 0, **options})
        self.app = create_app(settings, config)
        self._server = uvicorn.Server(server_config(self.app, host="127.0.0.1", port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.http = httpx2.Client(base_url=self.url, timeout=60)
        self.client = Client(settings=settings)

    def stop(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join()
        self.client.close()


@contextlib.contextmanager
def serving(
    servers: EmbeddedServers,
    forge: Forge,
    folder: Path,
    model: str,
    *,
    webhook_secret: str | None = None,
    **options: Any,
) -> Iterator[Gateway]:
    """A gateway and a worker for the model, `NAME=FOLDER` or `demo`; with a secret it tells this machine's webhooks."""
    settings = own_settings(servers)
    if webhook_secret is not None:
        signed = {"webhook_secret": SecretStr(webhook_secret), "webhook_allow_private": True}
        settings = settings.model_copy(update=signed)
    system = {name: value for name, value in os.environ.items() if not name.startswith("CALOTYPE_")}
    environment = {**system, **servers.environment, **settings.environment(), "CALOTYPE_WORKER_PROFILE_SECONDS": "0"}
    arguments = ["--model", model, "--max-rows", "8"]
    worker = forge.start(arguments, environment=environment, log=folder / "worker.log")
    gateway = Gateway(settings, **options)
    try:
        worker.wait_for("worker ready", 180)
        yield gateway
    finally:
        gateway.stop()
        worker.kill()
