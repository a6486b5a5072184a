"""Real worker processes for the integration tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from calotype import Client
from calotype_shared.queue.job_store import JobStore
from calotype_shared.settings import Settings
from tests.faults.harness import Forge, WorkerProcess
from tests.invariants import check_store


class CommandWorker:
    """A `python -m calotype_worker` of its own, with its log in a file, on all cores."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._output = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "calotype_worker", *arguments],
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def wait_until_ready(self, seconds: float = 180) -> None:
        until(lambda: "worker ready" in self.text() or self.process.poll() is not None, seconds)
        assert self.process.poll() is None, self.text()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._output.close()


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for a condition, bounded."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def start_worker(
    environment: dict[str, str], tiny_model: Path, tmp_path: Path, forge: Forge
) -> Iterator[Callable[..., WorkerProcess]]:
    """Starts workers on the tiny model; whatever still runs at the end is killed."""
    workers: list[WorkerProcess] = []

    def start(*arguments: str, ready: bool = True, **variables: str) -> WorkerProcess:
        log = tmp_path / f"worker-{len(workers)}.log"
        options = ["--model", f"tiny={tiny_model}", "--max-rows", "8", *arguments]
        worker = forge.start(options, environment={**environment, **variables}, log=log)
        workers.append(worker)
        if ready:
            worker.wait_for("worker ready")
        return worker

    yield start
    for worker in workers:
        worker.kill()


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings) as client:
        yield client


@pytest.fixture
def invariants(store: JobStore, redis: Redis) -> Iterator[None]:
    """After the test, every Redis key must agree with the records."""
    yield
    check_store(store, redis)
