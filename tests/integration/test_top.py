"""`calotype top` on a real Valkey, and completion as bash asks for it."""

from __future__ import annotations

import functools
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis import Redis

from calotype import Client, Lane
from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.jobs import JobError
from calotype_shared.schema.worker_info import StepGroup, StepRow, WorkerInfo
from tests.integration.conftest import Command
from tests.integration.test_fair_share import CARD

TOP = [sys.executable, "-m", "calotype", "top"]


@pytest.fixture
def busy(client: Client, store: JobStore, redis: Redis) -> str:
    """Two jobs wait, one runs in a worker's step batch, and one is dead; the id of the one that runs."""
    store.announce_model(CARD)
    dead = client.submit("dead", lane=Lane.BULK, num_inference_steps=5)
    claim = store.claim("demo.bulk", worker="w", lease_seconds=30)
    assert claim is not None
    store.fail(claim, JobError(code="bad", message="it [/cannot] be\x1b[2J done"), retry=False)
    assert client.dead_jobs.list()[0].id == dead.id
    running = client.submit("a \x1b[2J ring [bold]", lane=Lane.INTERACTIVE, num_inference_steps=50)
    assert store.claim("demo.interactive", worker="w", lease_seconds=300) is not None
    client.submit_many([{"prompt": "later", "num_inference_steps": 5}] * 2)
    announce(store, running.id, images=3)
    return running.id


def announce(store: JobStore, job: str, *, images: int) -> None:
    row = StepRow(job=job, image=0, step=25, total_steps=50, guided=True)
    shape = {"model": "demo", "width": 128, "height": 128, "budget": 32, "running": 1, "waiting": 4, "decoding": 0}
    info = {"name": "demo@here", "model": "demo", "device": "cpu", "host": "here", "pid": 1, "version": "0"}
    group = StepGroup(**shape, rows=(row,))
    store.announce_worker(WorkerInfo(**info, started_at=0.0, images=images, groups=(group,)), ttl_seconds=60)


@contextmanager
def started(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that an interrupt reaches, also where this one was started to ignore them; killed if it still runs."""
    restore_interrupt = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*TOP, *arguments], preexec_fn=restore_interrupt, **options) as process:  # noqa: PLW1509
        try:
            yield process
        finally:
            process.kill()


def test_one_look_for_scripts(busy: str, calotype: Command) -> None:
    """Queues, workers with their rows, and what failed for good, as one line of JSON."""
    done = calotype("top", "--once", "--json")
    [line] = done.stdout.splitlines()
    reported = json.loads(line)
    assert {queue["name"]: queue["waiting"] for queue in reported["queues"]} == {"demo.bulk": 2, "demo.interactive": 0}
    [row] = reported["workers"][0]["groups"][0]["rows"]
    assert (row["job"], row["step"], row["total_steps"], row["guided"]) == (busy, 25, 50, True)
    assert (reported["counts"]["running"], reported["counts"]["queued"], reported["images_a_second"]) == (1, 2, None)
    assert reported["failures"][0]["error"]["code"] == "bad"


def test_one_look_for_people(busy: str, calotype: Command) -> None:
    """The same, drawn; what others wrote controls no terminal and is no markup."""
    done = calotype("top", "--once")
    for words in ("bulk 2, oldest", "demo@here", "2/32 rows  4 waiting", "25/50", "guided", "bad: it [/cannot] be"):
        assert words in done.stdout, done.stdout
    assert "ring [bold]" in done.stdout
    assert "━" * 15 + "╌" * 15 in done.stdout
    assert "\x1b[2J" not in done.stdout


def test_looks_go_on_until_interrupted(busy: str, environment: dict[str, str], store: JobStore) -> None:
    """A line each, with the rate since the one before; an interrupt is the ordinary end."""
    with started(["--json", "--interval", "0.1"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["images_a_second"] is None
        announce(store, busy, images=9)
        rates = (json.loads(line)["images_a_second"] for line in process.stdout)
        assert next(rate for rate in rates if rate) > 0
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(120) == 0


def test_a_terminal_is_drawn_anew_and_left_as_it_was(busy: str, environment: dict[str, str], store: JobStore) -> None:
    """On a screen of its own, until it is interrupted."""
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 120))
    with started(
        ["--interval", "0.1"],
        env={**environment, "TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        seen = b""
        while b"images/s" not in seen:  # the second look has a rate
            seen += os.read(main, 65_536)
        assert b"\x1b[?1049h" in seen
        assert b"2/32 rows" in seen
        process.send_signal(signal.SIGINT)
        while b"\x1b[?1049l" not in seen:
            seen += os.read(main, 65_536)
        assert process.wait(120) == 0
    os.close(main)
    assert b"Traceback" not in seen


@pytest.mark.parametrize(
    ("typed", "offered"), [("calotype ba", {"batch"}), ("calotype submit --lane ", {"interactive", "bulk"})]
)
def test_bash_completes(typed: str, offered: set[str], calotype: Command) -> None:
    """Commands and what options take; as the script that `--show-completion` prints asks for it."""
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1), "_CALOTYPE_COMPLETE": "complete_bash"}
    done = calotype(**words)
    assert set(done.stdout.split()) == offered
