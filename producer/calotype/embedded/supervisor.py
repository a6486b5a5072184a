"""The supervisor of one child process: it ends the child when its parent has ended, for whatever reason.

Run as a script: `python -I -S supervisor.py GRACE_SECONDS COMMAND…`. Its standard input is a pipe that only the asking
process holds open, so end-of-file means "stop": the asker closed it on purpose, or died, even by SIGKILL. A pipe
follows the whole process; Linux's parent-death signal alone would also fire when merely the *thread* that started us
ends. What it prints is one line, the child's pid; the child's own output goes to standard error. Its exit status is
the child's (128 + n after signal n).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: list[str]) -> int:
    grace_seconds, command = float(arguments[0]), arguments[1:]
    supervisor = os.getpid()
    # preexec_fn is safe here: this process has one thread until the child exists.
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=lambda: _die_with(supervisor),  # noqa: PLW1509
    )
    print(child.pid, flush=True)

    def stop(*_: object) -> None:
        threading.Thread(target=_end, args=(child, grace_seconds), daemon=True).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the asker's to handle
    threading.Thread(target=_when_abandoned, args=(stop,), daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


def _when_abandoned(stop: object) -> None:
    """Wait for end-of-file on standard input, then stop the child."""
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    if callable(stop):
        stop()


def _end(child: subprocess.Popen[bytes], grace_seconds: float) -> None:
    child.terminate()
    try:
        child.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        child.kill()


def _die_with(supervisor: int) -> None:
    """Run between fork and exec: if the supervisor itself is killed, the kernel kills the child (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes  # noqa: PLC0415 - loaded only where it exists for us

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # the supervisor died before the line above took effect
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
