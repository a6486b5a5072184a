"""Batches while their dispatchers die, and while Redis forgets."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calotype import BatchHandle, BatchState
from calotype.embedded.valkey import ValkeyServer
from calotype_shared.settings import Settings
from tests.faults.harness import FULL, SHORT_LEASE, Outcome, Site, Table, config, until
from tests.invariants import check_store

LINES = 120 if FULL else 48
StartDispatcher = Callable[[Site], "subprocess.Popen[bytes]"]


@pytest.fixture
def start_dispatcher() -> Iterator[StartDispatcher]:
    """Starts `calotype dispatcher` processes; whatever runs at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(site: Site) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "calotype", "dispatcher"]
        with (site.folder / f"dispatcher-{len(started)}.log").open("wb") as log:
            started.append(
                subprocess.Popen(command, env=site.environment(site.settings), stdout=log, stderr=subprocess.STDOUT)
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def submit(site: Site) -> BatchHandle:
    lines = [{"custom_id": f"line-{i}", **config(i, long=True).model_dump(mode="json")} for i in range(LINES)]
    return site.client.batches.submit(lines, window=16)


def check_batch(site: Site, batch: BatchHandle) -> Outcome:
    """Every line has one result, whose image is there and is that of an undisturbed run; and all keys agree."""
    record = batch.status()
    assert (record.state, record.counts.succeeded, record.counts.done) == (BatchState.COMPLETED, LINES, LINES)
    results = list(batch.results())
    assert list(batch.errors()) == []
    seen = Counter(result["custom_id"] for result in results)
    lost, twice = LINES - len(seen), seen.total() - len(seen)
    assert (lost, twice) == (0, 0)
    keys = [image["key"] for result in results for image in result["images"]]
    assert len(set(keys)) == LINES
    site.check_images(keys)
    check_store(site.store, site.redis)
    return Outcome(jobs=LINES, lost=lost, twice=twice)


@pytest.mark.slow
def test_the_dispatcher_is_killed(site: Site, start_dispatcher: StartDispatcher, table: Table) -> None:
    """In mid-window, with a second one standing by and a worker that dies as well: the heir takes over by itself."""
    worker = site.start_worker("--concurrency", "6", *SHORT_LEASE)
    first = start_dispatcher(site)
    batch = submit(site)
    until(lambda: batch.status().counts.succeeded >= 4)
    start_dispatcher(site)
    first.send_signal(signal.SIGKILL)
    worker.kill()
    began = time.monotonic()
    site.start_worker("--concurrency", "6", *SHORT_LEASE)
    cursor = batch.status().cursor
    until(lambda: batch.status().cursor != cursor)
    took = time.monotonic() - began
    batch.wait(120)
    outcome = check_batch(site, batch)
    site.check_bucket(image["key"] for result in batch.results() for image in result["images"])
    table.add("dispatcher and worker killed during a batch", outcome, recovery_seconds=took)


@pytest.mark.slow
def test_redis_comes_back_as_it_was_before(
    tmp_path: Path,
    corner: Callable[..., Settings],
    make_site: Callable[..., Site],
    start_dispatcher: StartDispatcher,
    table: Table,
) -> None:
    """Restored from an older copy of its append-only file: the batch goes on from there and every line ends once."""
    folder, copy = tmp_path / "valkey", tmp_path / "copy"
    server = ValkeyServer.start(folder)
    try:
        site = make_site(corner(redis_url=server.url))
        worker = site.start_worker("--concurrency", "6", *SHORT_LEASE)
        start_dispatcher(site)
        batch = submit(site)
        until(lambda: batch.status().counts.succeeded >= 6)
        site.redis.config_set("appendfsync", "always")
        os.kill(server.process.pid, signal.SIGSTOP)  # so that the copy is of one moment
        shutil.copytree(folder, copy)
        os.kill(server.process.pid, signal.SIGCONT)
        until(lambda: batch.status().counts.succeeded >= 18)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(120)
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        server = ValkeyServer.start(folder, port=server.port)
        began = time.monotonic()
        assert batch.status().counts.succeeded < 18, "it is the older state"
        batch.wait(120)
        took = time.monotonic() - began
        assert worker.alive
        table.add("Redis restored from an older copy during a batch", check_batch(site, batch), recovery_seconds=took)
    finally:
        server.stop()
