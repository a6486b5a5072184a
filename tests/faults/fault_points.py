"""Where a worker can be made to stop, break or hold still, by name. Installed in a child process before it starts.

A stop prints `reached NAME` and blocks its thread, so that the test can kill the process at that very point; what the
process does elsewhere goes on as ever.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

POISON = "poison"  # a prompt with this word kills the process
CURSED = "cursed"  # a prompt with this word makes the model raise
STEPS_BEFORE = 3  # forward passes that go well before `step` is reached
CALLS_BEFORE = 12  # network calls of pipeline models that go well before `call` is reached


def install(name: str) -> None:
    """Patch the real code of this process."""
    _STOPS[name]()


def _reach(name: str) -> None:
    # One write, so that two threads' lines cannot mix.
    os.write(1, f"reached {name}\n".encode())
    threading.Event().wait()


def _wrap(owner: Any, method: str, *, before: Callable[..., None] | None = None, after: Any = None) -> None:
    original = getattr(owner, method)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after:
            after(result)
        return result

    setattr(owner, method, wrapped)


def _claimed() -> None:
    from calotype_shared.queue.job_store import JobStore

    _wrap(JobStore, "claim", after=lambda claim: _reach("claimed") if claim else None)


def _step() -> None:
    from calotype_worker.models.sd import StableDiffusion

    passes = iter(range(10**9))
    _wrap(StableDiffusion, "predict", after=lambda _: _reach("step") if next(passes) >= STEPS_BEFORE else None)


def _call() -> None:
    """In the middle of the runs of a pipeline model."""
    from calotype_worker.engine.call_batch import CallBatch

    calls = iter(range(10**9))
    _wrap(CallBatch, "step", after=lambda _: _reach("call") if next(calls) >= CALLS_BEFORE else None)


def _decode() -> None:
    from calotype_worker.models.sd import StableDiffusion

    _wrap(StableDiffusion, "decode", after=lambda _: _reach("decode"))


def _upload() -> None:
    """Half of an image's bytes are on the wire."""
    original = HTTPConnection.send

    def send(self: HTTPConnection, data: Any) -> None:
        body = data.read() if hasattr(data, "read") else data
        at = body.find(b"\x89PNG") if isinstance(body, bytes) else -1
        if at >= 0:
            original(self, body[: at + (len(body) - at) // 2])
            _reach("upload")
        original(self, body)

    HTTPConnection.send = send  # type: ignore[method-assign]


def _uploaded() -> None:
    from calotype_shared.queue.job_store import JobStore

    _wrap(JobStore, "commit", before=lambda *_, **__: _reach("uploaded"))


def _committed() -> None:
    from calotype_shared.queue.job_store import JobStore

    _wrap(JobStore, "commit", after=lambda _: _reach("committed"))


def _slow_commit() -> None:
    """The first commit is held back long enough to freeze the process, and each says how it was answered."""
    from calotype_shared.queue.job_store import JobStore

    first = threading.Lock()

    def hold(*_: Any, **__: Any) -> None:
        if first.acquire(blocking=False):
            os.write(1, b"reached slow-commit\n")
        time.sleep(0.7)

    def say(answer: bool) -> None:
        os.write(1, f"commit answered {answer}\n".encode())

    _wrap(JobStore, "commit", before=hold, after=say)


def _slow_prepare() -> None:
    """What comes before the engine takes three seconds."""
    from calotype_worker.engine import engine

    def hold(*_: Any, **__: Any) -> None:
        os.write(1, b"reached slow-prepare\n")
        time.sleep(3)

    _wrap(engine, "prepare", before=hold)


def _skewed(seconds: float) -> None:
    """This machine's clock is wrong."""
    for name, unit in (("time", 1.0), ("time_ns", 1e9)):
        original = getattr(time, name)
        skew = type(original())(seconds * unit)
        setattr(time, name, lambda original=original, skew=skew: original() + skew)


def _held() -> None:
    """While the file $TEST_HOLD exists, the third step from then on waits, so that a test can look at what runs."""
    from calotype_worker.models.sd import StableDiffusion

    file, steps, began = Path(os.environ["TEST_HOLD"]), 0, 0

    def written() -> int:
        """When the file was made or touched; 0 while it does not exist."""
        try:
            return file.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def wait(_: Any) -> None:
        nonlocal steps, began
        now = written()
        steps = steps + 1 if now == began else 1
        began = now
        # The next test may have made the file again before this thread saw it go: that is another hold.
        while began and steps > 2 and written() == began:
            time.sleep(0.02)

    _wrap(StableDiffusion, "predict", after=wait)


def _poison() -> None:
    """A job that takes its whole process along, as a bug in a driver would."""
    from calotype_worker.engine import Engine

    def look(_: Any, request: Any) -> None:
        if POISON in request.prompt:
            os.kill(os.getpid(), signal.SIGKILL)

    _wrap(Engine, "submit", before=look)


def _cursed() -> None:
    """A prompt on which the text encoder raises, for itself and for every prompt encoded together with it."""
    from calotype_worker.models.sd import StableDiffusion

    def look(_: Any, texts: Any) -> None:
        if any(CURSED in text.prompt for text in texts):
            raise RuntimeError("this prompt does something to me")

    _wrap(StableDiffusion, "encode", before=look)


def _disk_full() -> None:
    """Writing a spooled file fails as on a full disk, after a part of it was written."""
    original = Path.write_bytes

    def write_bytes(self: Path, data: Any) -> int:
        if "calotype-spool-" in str(self):
            original(self, bytes(data)[: len(data) // 2])
            raise OSError(28, "No space left on device", str(self))
        return original(self, data)

    Path.write_bytes = write_bytes  # type: ignore[method-assign]


def _commit_unanswered() -> None:
    """Commits take effect, and the responses are lost."""
    from calotype_shared.errors import RedisUnavailable
    from calotype_shared.queue.job_store import JobStore

    def lose(_: bool) -> None:
        os.write(1, b"reached commit-unanswered\n")
        raise RedisUnavailable("the response was lost")

    _wrap(JobStore, "commit", after=lose)


def _newer() -> None:
    """This process is of the next version: it writes and does records of a schema that others do not know."""
    from calotype_shared.queue.scripts import Scripted

    Scripted.schema += 1


_STOPS: dict[str, Callable[[], None]] = {
    "claimed": _claimed,
    "step": _step,
    "call": _call,
    "decode": _decode,
    "upload": _upload,
    "uploaded": _uploaded,
    "committed": _committed,
    "slow-commit": _slow_commit,
    "slow-prepare": _slow_prepare,
    "commit-unanswered": _commit_unanswered,
    "clock-ahead": lambda: _skewed(600),
    "clock-behind": lambda: _skewed(-600),
    "held": _held,
    "poison": _poison,
    "cursed": _cursed,
    "disk-full": _disk_full,
    "newer": _newer,
}
POINTS = ("claimed", "step", "decode", "upload", "uploaded", "committed")
