"""`calotype demo` as a user runs it, on a tiny model: its files, its table, and that nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.conftest import until

_PROMPTS = [
    {"prompt": "a cat", "num_inference_steps": 3, "seed": 1},
    {"prompt": "two cats", "num_inference_steps": 5, "seed": 2, "sampler": "euler", "num_images": 2},
    {"prompt": "no cat", "num_inference_steps": 4, "seed": 3, "guidance_scale": 1.0, "output_format": "webp"},
]


def processes_about(folder: Path) -> list[str]:
    """Command lines of live processes that were given a path in this folder, or work in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            where = str((entry / "cwd").readlink())
        except OSError:
            continue  # it has just ended, or is another user's
        if int(entry.name) != os.getpid() and (str(folder) in command or where.startswith(str(folder))):
            found.append(command)
    return found


@pytest.fixture
def corner(tmp_path: Path, tiny_model: Path) -> Iterator[Path]:
    """A folder that all processes of the demo name: the model is linked into it, and TMPDIR is in it."""
    (tmp_path / "tiny").symlink_to(tiny_model)
    (tmp_path / "tmp").mkdir()
    yield tmp_path
    until(lambda: not processes_about(tmp_path))


def start_demo(corner: Path, prompts: list[dict[str, object]]) -> subprocess.Popen[str]:
    (corner / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    arguments = ["--prompts", "prompts.jsonl", "--out", "out", "--model", f"tiny={corner / 'tiny'}", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "calotype", "demo", *arguments],
        cwd=corner,
        env={**os.environ, "TMPDIR": str(corner / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_demo_makes_its_images_and_stops_everything(corner: Path) -> None:
    """Each image and the contact sheet are written, the table is printed, and no process or file stays behind."""
    demo = start_demo(corner, _PROMPTS)
    said, _ = demo.communicate(timeout=150)
    assert demo.returncode == 0, said
    files = sorted(file.name for file in (corner / "out").iterdir())
    assert files == ["01-0.png", "02-0.png", "02-1.png", "03-0.webp", "contact-sheet.png"]
    with Image.open(corner / "out" / "contact-sheet.png") as sheet:
        assert sheet.width > 4 * 256
    for expected in ("4 from 3 of 3 jobs", "images/s", "rows a step", "p50", "p95", "queue overhead"):
        assert expected in said
    assert not processes_about(corner)
    assert list((corner / "tmp").iterdir()) == []


@pytest.mark.slow
def test_an_interrupt_stops_the_demo_and_all_it_started(corner: Path) -> None:
    """Ctrl-C in the middle of the work: exit status 130 within seconds, nothing left."""
    demo = start_demo(corner, [{"prompt": "a long one", "num_inference_steps": 900, "num_images": 40}])
    assert demo.stdout is not None
    for line in demo.stdout:
        if "0/1 jobs done" in line:
            break
    demo.send_signal(signal.SIGINT)
    assert demo.wait(120) == 130
    demo.stdout.close()
    until(lambda: not processes_about(corner))
    assert list((corner / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_job_that_fails_is_named_and_the_others_are_kept(corner: Path) -> None:
    """Exit status 1 with the reason; the contact sheet has the rest."""
    demo = start_demo(corner, [*_PROMPTS[:1], {"prompt": "x" * 600, "num_inference_steps": 3}])
    said, _ = demo.communicate(timeout=150)
    assert demo.returncode == 1, said
    assert "1 from 1 of 2 jobs" in said
    assert "windows" in said
    assert (corner / "out" / "contact-sheet.png").exists()
