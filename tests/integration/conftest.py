"""Real worker processes for the integration tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from calotype import Client
from calotype_shared.queue.job_store import JobStore
from calotype_shared.settings import Settings
from tests.faults.harness import Forge, WorkerProcess, until
from tests.invariants import check_store

Command = Callable[..., "subprocess.CompletedProcess[str]"]


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


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of dispatchers in this process, which rest for seconds where there is nothing to do."""
    monkeypatch.setattr("calotype.batches.dispatcher._LOOK_SECONDS", 0.1)
    monkeypatch.setattr("calotype.batches.dispatcher._REST_SECONDS", 0.3)
    monkeypatch.setattr("calotype.batches.run._FLUSH_SECONDS", (0.2, 60.0))
    monkeypatch.setattr("calotype.batches.run._PAUSE_SECONDS", 0.05)


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
def calotype(environment: dict[str, str], forge: Forge) -> Command:
    """Runs a `calotype` command in this test's corner to its end, as a process of its own."""

    def run(*arguments: str, typed: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return forge.command(*arguments, environment={**environment, **variables}, typed=typed)

    return run


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings) as client:
        yield client


@pytest.fixture
def invariants(store: JobStore, redis: Redis) -> Iterator[None]:
    """After the test, every Redis key must agree with the records."""
    yield
    check_store(store, redis)
