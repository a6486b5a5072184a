"""The embedded servers start, answer, keep their data and never outlive the process that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from calotype.embedded import ChildProcess, EmbeddedServers
from calotype_shared.errors import ServiceUnavailable
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage

_HOLD = """
import sys, time
from pathlib import Path
from calotype.embedded import EmbeddedServers
servers = EmbeddedServers.start(Path(sys.argv[1]))
print(servers.valkey.process.pid, servers.seaweed.process.pid, flush=True)
time.sleep(300)
"""


def _gone(pid: int) -> bool:
    """Whether no live process has that pid; a zombie that nobody reaps in a container counts as gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def _until(condition: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.slow
def test_servers_keep_their_data_over_a_restart_and_leave_no_process(tmp_path: Path) -> None:
    """A second start on the same directory, at other ports, finds the first one's job data, object and keys."""
    with EmbeddedServers.start(tmp_path) as servers:
        first = [servers.valkey.process.pid, servers.seaweed.process.pid]
        keys = servers.seaweed.credentials
        with Redis.from_url(servers.valkey.url) as redis:
            redis.set("kept", "yes")
            assert redis.config_get("appendonly")["appendonly"] == "yes"
            assert redis.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
            assert redis.config_get("bind")["bind"] == "127.0.0.1"
        servers.seaweed._client().put_object(Bucket="calotype", Key="kept", Body=b"pixels")
    assert all(_gone(pid) for pid in first)

    with EmbeddedServers.start(tmp_path) as servers:
        second = [servers.valkey.process.pid, servers.seaweed.process.pid]
        with Redis.from_url(servers.valkey.url) as redis:
            assert redis.get("kept") == b"yes"
        assert servers.seaweed.credentials == keys
        kept = servers.seaweed._client().get_object(Bucket="calotype", Key="kept")
        assert kept["Body"].read() == b"pixels"
    assert all(_gone(pid) for pid in second)
    on_disk = sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*") if file.is_file())
    assert on_disk < 10_000_000


def test_no_port_of_the_storage_serves_a_web_page_without_keys(
    servers: EmbeddedServers, settings: Settings, storage: Storage
) -> None:
    """Not the filer's, which let any origin read and write, nor the master's, which could delete the bucket."""
    bucket, answers = settings.s3_bucket, []
    storage.put("secret", b"pixels", "image/png")
    for port in servers.seaweed._ports:
        for path in (
            f"/buckets/{bucket}/secret",
            "/buckets/?limit=1",
            "/dir/assign",
            f"/col/delete?collection={bucket}",
        ):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"origin": "http://a.example"})
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
                answers.append((path, answer.status))
    assert answers == []
    assert storage.get("secret") == b"pixels"


def test_servers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the process that started them, which runs no clean-up, still ends both servers."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    pids = [int(word) for word in holder.stdout.readline().split()]
    assert len(pids) == 2
    assert not any(_gone(pid) for pid in pids)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert _until(lambda: all(_gone(pid) for pid in pids))


def test_a_data_directory_serves_one_at_a_time(servers: EmbeddedServers, tmp_path: Path) -> None:
    """A second start on a directory in use is refused with the remedy, and disturbs nothing."""
    in_use = servers.data_dir
    with pytest.raises(ServiceUnavailable, match="--data-dir"):
        EmbeddedServers.start(in_use)
    with Redis.from_url(servers.valkey.url) as redis:
        assert redis.ping()


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    """Stop escalates to SIGKILL, and reports it as 128 + 9."""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    child = ChildProcess("stubborn", [sys.executable, "-c", stubborn], log=tmp_path / "log", grace_seconds=0.5)
    assert _until(lambda: child.log_tail() == "up")
    assert child.stop() == 128 + signal.SIGKILL
    assert _gone(child.pid)
    assert child.stop() == 128 + signal.SIGKILL  # again: nothing happens


def test_a_child_dies_when_its_guard_is_killed(tmp_path: Path) -> None:
    """Killing the supervisor, not the parent, leaves no orphan either."""
    child = ChildProcess("sleeper", [sys.executable, "-c", "import time; time.sleep(60)"], log=tmp_path / "log")
    child._supervisor.kill()
    assert _until(lambda: _gone(child.pid))
    child.stop()


def test_a_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    """The error names the command; no half-started process is left."""
    with pytest.raises(OSError, match="no-such-server"):
        ChildProcess("absent", ["/no-such-server"], log=tmp_path / "log")


@pytest.mark.slow
def test_a_server_that_dies_while_starting_shows_its_last_words(tmp_path: Path) -> None:
    """A data directory that Valkey cannot use becomes one error with Valkey's own log lines."""
    broken = tmp_path / "valkey" / "appendonlydir"
    broken.mkdir(parents=True)
    (broken / "appendonly.aof.manifest").write_text("this is no manifest\n")
    with pytest.raises(ServiceUnavailable, match="manifest"):
        EmbeddedServers.start(tmp_path)
