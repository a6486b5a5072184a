"""What is wrong at a worker's start is one clear line and a status that scripts can tell apart."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calotype_worker.__main__ import main
from tests.integration.conftest import until


@pytest.fixture
def refused(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Starts a worker that must not come up, in this process; returns what it said."""
    import logging

    from calotype_worker import __main__ as entry

    # The root logger belongs to pytest here.
    monkeypatch.setattr(entry, "set_up_logging", lambda **_: logging.getLogger())
    for name, value in environment.items():
        if name.startswith("CALOTYPE_"):
            monkeypatch.setenv(name, value)

    def start(*arguments: str, status: int, **variables: str) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        assert main(list(arguments)) == status
        said = capsys.readouterr().err.strip()
        assert len(said.splitlines()) == 1, said
        return said

    return start


@pytest.mark.parametrize(
    ("variables", "status", "said"),
    [
        ({"CALOTYPE_REDIS_URL": "redis://:secret@127.0.0.1:1/0"}, 4, "127.0.0.1:1 cannot be used"),
        ({"CALOTYPE_S3_SECRET_ACCESS_KEY": "wrong"}, 4, "keys were refused"),
        ({"CALOTYPE_S3_BUCKET": "missing", "CALOTYPE_WORKER_CREATE_BUCKET": "false"}, 4, "'missing' does not exist"),
        ({"CALOTYPE_S3_ENDPOINT_URL": "http://127.0.0.1:1"}, 4, "CALOTYPE_S3_ENDPOINT_URL"),
        ({"CALOTYPE_REDIS_ULR": "x"}, 2, "CALOTYPE_REDIS_ULR is not a setting"),
        ({"CALOTYPE_REDIS_URL": "http://:secret@host"}, 2, "must start with redis://"),
        ({"CALOTYPE_WORKER_MAX_ROWS": "many"}, 2, "CALOTYPE_WORKER_MAX_ROWS='many'"),
        ({"CALOTYPE_WORKER_DEVICE": "tpu"}, 2, "CALOTYPE_WORKER_DEVICE='tpu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_and_services(refused: Any, variables: dict[str, str], status: int, said: str) -> None:
    """The setting, the value and the remedy; never a secret."""
    message = refused(status=status, **variables)
    assert said in message
    shown = message.lower()
    for setting in ("secret_access_key", "webhook_secret"):
        shown = shown.replace(setting, "")
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "tiny=/no/such/folder"], "'/no/such/folder' does not exist"),
        (["--model", "other"], "has no source"),
        (["--device", "cuda:7"], "torch sees 0 CUDA devices"),
    ],
)
def test_models_and_devices_that_are_not_there(refused: Any, arguments: list[str], said: str) -> None:
    """The operator's command line is at fault, and the message says which part."""
    assert said in refused(*arguments, status=6)


def test_a_broken_model_folder(refused: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Truncated weights, a missing part, pickled weights, an unknown family: each says which file."""

    def broken(name: str, spoil: Callable[[Path], Any]) -> str:
        folder = tmp_path / name
        shutil.copytree(tiny_model, folder)
        spoil(folder)
        said: str = refused("--model", f"{name}={folder}", status=6)
        return said

    weights = "unet/diffusion_pytorch_model.safetensors"
    assert "unet/diffusion_pytorch_model.safetensors" in broken(
        "short", lambda f: (f / weights).write_bytes(b"\0" * 100)
    )
    assert "unet/ should hold safetensors" in broken("none", lambda f: (f / weights).unlink())
    assert "only a pickle" in broken("pickled", lambda f: (f / weights).rename(f / "unet/model.bin"))
    assert "no model_index.json" in broken("bare", lambda f: (f / "model_index.json").unlink())
    other = '{"_class_name": "KandinskyPipeline"}'
    assert "KandinskyPipeline" in broken("kandinsky", lambda f: (f / "model_index.json").write_text(other))


def test_a_worker_that_still_starts_hears_sigterm(environment: dict[str, str]) -> None:
    """By a handler of its own, from its first moment: process 1 of a container is killed by no signal without one."""
    worker = subprocess.Popen([sys.executable, "-m", "calotype_worker"], env=environment, stderr=subprocess.DEVNULL)
    try:
        until(lambda: catches(worker.pid, signal.SIGTERM) or worker.poll() is not None)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 128 + signal.SIGTERM, "and not -15, which would be the signal itself"
    finally:
        worker.kill()
        worker.wait()


def catches(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [mask] = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")]
    return bool(mask >> (number - 1) & 1)
