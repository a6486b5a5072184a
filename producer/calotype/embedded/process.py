"""A child process that never outlives us: started, watched and stopped by pid."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_SUPERVISOR_SLACK_SECONDS = 2.0  # for the supervisor to kill and reap a child that ignored SIGTERM


class ChildProcess:
    """One command under a supervisor (see `supervisor.py`), its output in a log file.

    `pid` is the command's. Owned by the code that started it; `stop` can be called from any thread, and twice.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        grace_seconds: float = 10.0,
    ) -> None:
        self.name = name
        self.log = log
        self._grace_seconds = grace_seconds
        with log.open("ab") as output:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), str(grace_seconds), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=cwd,
                env=None if environment is None else dict(environment),
                start_new_session=True,  # Ctrl-C in a terminal reaches us alone; we stop the children in order
            )
        assert self._supervisor.stdout is not None
        first_line = self._supervisor.stdout.readline()
        if not first_line:
            self._supervisor.wait()
            raise OSError(f"{command[0]} could not be started: {self.log_tail(3)}")
        self.pid = int(first_line)

    @property
    def alive(self) -> bool:
        return self._supervisor.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 128 + n if signal n ended it."""
        return self._supervisor.poll()

    def wait(self, timeout: float | None = None) -> int:
        return self._supervisor.wait(timeout)

    def begin_stop(self) -> None:
        """Send SIGTERM and return immediately; the supervisor kills it after its grace period."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()

    def stop(self) -> int:
        """SIGTERM, a grace period, SIGKILL. Returns the exit status when the process has ended."""
        self.begin_stop()
        try:
            return self._supervisor.wait(self._grace_seconds + _SUPERVISOR_SLACK_SECONDS)
        except subprocess.TimeoutExpired:  # the supervisor hangs: killing it makes the kernel kill the child
            self._supervisor.kill()
            return self._supervisor.wait()
        finally:
            if self._supervisor.stdout is not None:
                self._supervisor.stdout.close()

    def log_tail(self, lines: int = 8) -> str:
        """The last lines it wrote, for an error message."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.strip().splitlines()[-lines:]) or "(it wrote nothing)"
