"""One worker and one gateway, real and with their metrics ports open, that have seen all that metrics tell of."""

from __future__ import annotations

import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from calotype import Client
from calotype.embedded import EmbeddedServers
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.keys import queue_name
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.resolve import ResolvedConfig
from tests.faults.harness import Forge, WorkerProcess
from tests.integration.conftest import start_worker, until  # noqa: F401 - a fixture
from tests.integration.gateway import Gateway, own_settings

SECRET = "a secret for webhooks, long enough to be taken"


def answer_of(url: str) -> tuple[int, str]:
    """Status and body of whatever it is."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@dataclass(frozen=True, kw_only=True)
class Scrape:
    """Everything a target said at one moment."""

    text: str
    families: dict[str, Metric] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str) -> Scrape:
        status, text = answer_of(url)
        assert status == 200, text
        return cls(text=text, families={family.name: family for family in text_string_to_metric_families(text)})

    @property
    def labels(self) -> dict[str, set[str]]:
        """By the name of a series: the labels it has had."""
        found: dict[str, set[str]] = {}
        for family in self.families.values():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found

    def value(self, name: str, **labels: str) -> float:
        """Of one series, or the sum of all with these labels."""
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, f"no {name} with {labels}"
        return sum(found)


class Stack:
    """The worker and the gateway, and how to look at them."""

    def __init__(self, gateway: Gateway, worker: WorkerProcess) -> None:
        self.gateway = gateway
        self.worker = worker
        self.client: Client = gateway.client
        self.redis: Redis = connect_redis(gateway.settings)
        self.store = JobStore(self.redis, key_prefix=gateway.settings.key_prefix)
        metrics = gateway.app.state.services.metrics
        self.gateway_port: int = metrics.port
        found = re.search(r"metrics_port=(\d+)", worker.text())
        assert found, worker.text()
        self.worker_port = int(found[1])

    def scrape_worker(self) -> Scrape:
        return Scrape.of(f"http://127.0.0.1:{self.worker_port}/metrics")

    def scrape_gateway(self) -> Scrape:
        return Scrape.of(f"http://127.0.0.1:{self.gateway_port}/metrics")


def tiny(seed: int, **changes: object) -> dict[str, object]:
    return {"prompt": f"cat {seed}", "model": "tiny", "seed": seed, "num_inference_steps": 4, **changes}


@pytest.fixture(scope="session")
def stack(
    servers: EmbeddedServers, forge: Forge, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Jobs that succeed, that fail, that wait for a model nobody serves, and a webhook nobody takes."""
    folder = tmp_path_factory.mktemp("observed")
    settings = own_settings(servers).model_copy(update={"webhook_allow_private": True})
    settings = type(settings)(**{**settings.model_dump(), "webhook_secret": SECRET})
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CALOTYPE_")},
        **settings.environment(),
        "CALOTYPE_WORKER_METRICS_PORT": "0",
        "CALOTYPE_WORKER_PROFILE_SECONDS": "0",
    }
    arguments = ["--model", f"tiny={tiny_model}", "--max-rows", "8"]
    worker = forge.start(arguments, environment=environment, log=folder / "worker.log")
    gateway = Gateway(settings, metrics_port=0)
    try:
        worker.wait_for("worker ready")
        stack = Stack(gateway, worker)
        hook = f"{gateway.url}/nobody/takes/this"
        asked = [tiny(seed, webhook_url=hook if seed == 0 else None) for seed in range(6)]
        ids = [gateway.http.post("/v1/jobs", json=body).json()["id"] for body in asked]
        ids.append(gateway.http.post("/v1/jobs", json=tiny(9, prompt="x" * 600)).json()["id"])
        stack.client.wait(ids, 120, check=False)
        assert gateway.http.get("/v1/jobs/unknown").status_code == 404
        absent = ResolvedConfig(prompt="cat", model="absent", seed=1, width=64, height=64)
        stack.store.create([absent, absent], lane=Lane.BULK)
        assert stack.store.depths()[queue_name(["absent"], Lane.BULK)] == 2
        until(lambda: stack.scrape_gateway().value("calotype_webhooks_total", outcome="postponed"))
        yield stack
        stack.redis.close()
    finally:
        gateway.stop()
        worker.kill()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without Prometheus' tools the tests that need them are not selected, which is said; `make check` wants them."""
    missing = [name for name in ("promtool", "prometheus") if shutil.which(name) is None]
    left = [item for item in items if item.get_closest_marker("promtool")] if missing else []
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.write_line(f"NOT RUN, for want of {' and '.join(missing)}: {len(left)} tests of rules and queries")
