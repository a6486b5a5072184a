"""`calotype up` and the other commands as a user runs them: processes, exit statuses, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.faults.harness import Forge
from tests.integration.conftest import until

Run = Callable[..., subprocess.CompletedProcess[str]]


class Up:
    """A running `calotype up`."""

    def __init__(self, process: subprocess.Popen[str], said: dict[str, Any]) -> None:
        self.process = process
        self.said = said


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    from tests.models import write_tiny_sd

    folder = tmp_path_factory.mktemp("up")
    model = write_tiny_sd(folder / "tiny")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CALOTYPE_")}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "calotype",
            "up",
            "--port",
            "0",
            "--json",
            "--model",
            f"tiny={model}",
            "--data-dir",
            str(folder / "data"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=clean,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "calotype up ended without a word"
        yield Up(process, json.loads(line))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(120)
        process.stdout.close()


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


@pytest.fixture
def run(up: Up, forge: Forge) -> Run:
    """Runs a `calotype` command against it."""

    def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = forge.command(*arguments, environment={**os.environ, **up.said["environment"]})
        assert done.returncode == status, done.stderr
        return done

    return run


def test_the_gateway_is_up_too(up: Up) -> None:
    """With every API, and a dispatcher for batches."""
    url = up.said["gateway_url"]
    assert httpx2.get(f"{url}/readyz").json() == {"status": "ok"}
    assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
    lines = json.dumps({"prompt": "a cat", "model": "tiny", "num_inference_steps": 2}).encode() + b"\n"
    file = httpx2.post(f"{url}/v1/files", files={"file": ("jobs.jsonl", lines * 3)}).json()
    batch = httpx2.post(f"{url}/v1/batches", json={"input_file_id": file["id"], "endpoint": "/v1/jobs"}).json()
    until(lambda: httpx2.get(f"{url}/v1/batches/{batch['id']}").json()["status"] == "completed")
    assert httpx2.get(f"{url}/v1/batches/{batch['id']}").json()["request_counts"]["completed"] == 3


def test_submit_wait_and_save(run: Run, tmp_path: Path) -> None:
    """The image lands in the folder, and JSON says where."""
    done = run("submit", "a cat", "--model", "tiny", "--steps", "4", "--seed", "3", "-o", str(tmp_path), "--json")
    said = json.loads(done.stdout)
    assert (said["state"], said["config"]["seed"], said["progress"]) == ("succeeded", 3, 1.0)
    assert said["urls"][0].startswith("http://127.0.0.1:")
    with Image.open(said["files"][0]) as image:
        assert image.size == (64, 64)


def test_status_jobs_models_and_cancel(run: Run) -> None:
    """A job's life as the commands show it."""
    job_id = run("submit", "a long one", "--model", "tiny", "--steps", "900").stdout.strip()
    assert job_id in run("status", job_id).stdout
    assert job_id in run("jobs").stdout
    assert json.loads(run("cancel", job_id, "--json").stdout) == {"id": job_id, "state": "cancelled"}
    run("cancel", job_id)  # again: no harm
    assert json.loads(run("status", job_id, "--json").stdout)["state"] == "cancelled"
    run("status", job_id, "--watch", status=1)
    assert json.loads(run("models", "--json").stdout)[0]["name"] == "tiny"


def test_what_goes_wrong_has_its_own_status(run: Run) -> None:
    """Unknown id, unknown model, a size the model cannot make, a wait that is too short, a job that fails."""
    assert "'nothing'" in run("status", "nothing", status=3).stderr
    assert "model='sdxl': no worker has announced" in run("submit", "x", "--model", "sdxl", status=2).stderr
    assert "width=60" in run("submit", "x", "--model", "tiny", "--width", "60", status=2).stderr
    late = ("submit", "x", "--model", "tiny", "--steps", "900", "--wait", "--timeout", "0.5")
    late_said = run(*late, status=5).stderr
    run("cancel", late_said.split()[1])
    assert "windows" in run("submit", "x" * 600, "--model", "tiny", "--wait", status=1).stderr


def test_a_killed_worker_is_replaced(run: Run, up: Up) -> None:
    """`up` starts another in its place, and jobs submitted meanwhile are done."""
    [worker] = up.said["workers"]
    os.kill(worker["pid"], signal.SIGKILL)
    run("submit", "after a crash", "--model", "tiny", "--steps", "3", "--wait")
    assert not Path(f"/proc/{worker['pid']}").exists()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_up_with_the_workers_own_words(tmp_path: Path) -> None:
    """Status 4, the worker's message on standard error, and both servers stopped again."""
    (tmp_path / "broken").mkdir()
    command = [sys.executable, "-m", "calotype", "up", "--model", f"broken={tmp_path / 'broken'}", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--data-dir", str(tmp_path / "data")], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 4
    assert "worker on cpu exited with status 6" in done.stderr
    assert "model_index.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupt_stops_everything(up: Up) -> None:
    """Exit status 0, and neither server nor worker is left. Last: the others need it running."""
    guards = children_of(up.process.pid)
    pids = [*guards, *(pid for guard in guards for pid in children_of(guard))]
    assert len(pids) == 6  # Valkey, SeaweedFS and a worker, each under its guard
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(120) == 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
