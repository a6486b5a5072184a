"""Imports the worker and the `calotype` command once, and forks a process whenever a line on standard input asks.

Torch takes seconds to import, the command nearly one, and the tests start some hundred of each. A child runs the `main`
of its program in a process of its own, with its own environment and files; only what was imported is shared, and
nothing of it has run.

Lines are JSON, as are the answers: `{"program": "worker" | "calotype", "arguments": […], "environment": {…}, "files":
[stdin, stdout, stderr], "stops": […]}` is answered by the child's pid, `{"status": pid}` by its exit status (minus the
signal's number) or null. When the input ends, all end.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    import diffusers  # noqa: F401
    import transformers  # noqa: F401
    from diffusers import StableDiffusionPipeline  # noqa: F401

    import calotype_worker.models
    import calotype_worker.worker  # noqa: F401

    ended: dict[int, int] = {}
    _say("ready")
    for line in sys.stdin:
        asked = json.loads(line)
        if "status" in asked:
            _say(_status(asked["status"], ended))
        else:
            _say(_fork(asked))


def _say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def _status(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return None
        ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]


def _fork(asked: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for standard, file in enumerate(asked["files"]):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if standard else os.O_RDONLY
            os.dup2(os.open(file, flags), standard)
        os.environ.clear()
        os.environ.update(asked["environment"])
        from tests.faults.fault_points import install

        for stop in asked["stops"]:
            install(stop)
        if asked["program"] == "worker":
            from calotype_worker.__main__ import main as run
        else:
            from calotype.cli import main as run  # type: ignore[assignment]
        status = run(asked["arguments"])
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
