"""Worker processes on this machine, one per device: started, watched, restarted a few times, stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from calotype.embedded.process import ChildProcess
from calotype_shared.errors import ServiceUnavailable
from calotype_shared.schema.worker_info import WorkerInfo

MAX_RESTARTS = 3  # of one worker; then something is wrong that a restart does not cure
_DEVICES_TIMEOUT_SECONDS = 120.0  # the first import of torch on a cold disk is slow
_DRAIN_SECONDS = 5.0  # for jobs in flight to finish; then the worker hands them back to the queue
_GRACE_SECONDS = 15.0  # then it is killed
_POLL_SECONDS = 0.2
_WORKER_PACKAGES = ("calotype_worker", "torch", "diffusers", "transformers", "celery")


def require_worker() -> None:
    """Raise ServiceUnavailable unless the worker's packages are installed. Imports none of them."""
    missing = [name for name in _WORKER_PACKAGES if find_spec(name) is None]
    if missing:
        raise ServiceUnavailable(
            f"the worker is not installed ({', '.join(missing)} missing); run: pip install 'calotype[worker]'"
        )


def local_devices(environment: Mapping[str, str] | None = None) -> list[str]:
    """The devices of this machine, as the worker sees them: every CUDA device, else `cpu`.

    Uses a separate process, because only the worker may import torch.
    """
    require_worker()
    asked = subprocess.run(
        [sys.executable, "-m", "calotype_worker", "--devices"],
        capture_output=True,
        text=True,
        timeout=_DEVICES_TIMEOUT_SECONDS,
        check=False,
        env=None if environment is None else dict(environment),
    )
    try:
        devices = json.loads(asked.stdout)
    except json.JSONDecodeError:
        raise ServiceUnavailable(
            f"the worker could not list this machine's devices (exit status {asked.returncode}): "
            f"{asked.stderr.strip()[-400:] or asked.stdout.strip()[-400:]}; give them with --device"
        ) from None
    return [str(device) for device in devices]


@dataclass
class _Slot:
    """One worker: its device, its present process, and how often it was restarted."""

    device: str
    process: ChildProcess
    restarts: int = 0


class LocalWorkers:
    """Owns the worker processes. `watch` is called now and then by the thread that owns this object.

    `say` is called with one sentence when a worker died or was restarted. Workers end with this process,
    however it ends.
    """

    def __init__(
        self,
        *,
        model: str,
        devices: Sequence[str],
        environment: Mapping[str, str],
        log_dir: Path,
        say: Callable[[str], None],
    ) -> None:
        self.model = model
        self._environment = {**os.environ, **environment}
        cpu_workers = sum(device == "cpu" for device in devices)
        if cpu_workers > 1:  # side by side on the same cores: share them instead of each claiming all
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // cpu_workers)))
        self._log_dir = log_dir
        self._say = say
        log_dir.mkdir(parents=True, exist_ok=True)
        self._slots: list[_Slot] = []
        try:
            for number, device in enumerate(devices):
                self._slots.append(_Slot(device, self._spawn(number, device)))
        except BaseException:
            self.stop()
            raise

    @property
    def processes(self) -> list[tuple[str, int]]:
        """Device and pid of each worker."""
        return [(slot.device, slot.process.pid) for slot in self._slots]

    def await_ready(self, reports: Callable[[], Sequence[WorkerInfo]], timeout: float) -> None:
        """Return once every worker has loaded its model and announced itself in `reports()`.

        Raises:
            ServiceUnavailable: one exited, or was not ready in time; the message contains its last log lines.
        """
        deadline = time.monotonic() + timeout
        while True:
            for slot in self._slots:
                if not slot.process.alive:
                    raise ServiceUnavailable(
                        f"the worker on {slot.device} exited with status {slot.process.exit_code} during start-up; "
                        f"its last log lines:\n{slot.process.log_tail()}"
                    )
            announced = {report.pid for report in reports()}
            waited_for = [slot for slot in self._slots if slot.process.pid not in announced]
            if not waited_for:
                return
            if time.monotonic() > deadline:
                raise ServiceUnavailable(
                    f"the worker on {waited_for[0].device} was not ready after {timeout:g} s; "
                    f"its last log lines:\n{waited_for[0].process.log_tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def watch(self) -> None:
        """Restart workers that died. Raises ServiceUnavailable when one has died too often."""
        for number, slot in enumerate(self._slots):
            if slot.process.alive:
                continue
            ended = f"worker {slot.process.pid} on {slot.device} ended with status {slot.process.exit_code}"
            if slot.restarts >= MAX_RESTARTS:
                raise ServiceUnavailable(
                    f"{ended}, the {MAX_RESTARTS + 1}th time; giving up. Its last log lines:\n{slot.process.log_tail()}"
                )
            slot.process.stop()
            slot.restarts += 1
            slot.process = self._spawn(number, slot.device)
            self._say(f"{ended}; started {slot.process.pid} in its place ({slot.restarts} of {MAX_RESTARTS} restarts)")

    def stop(self) -> None:
        """Let every worker return its jobs, then end it. All in parallel."""
        for slot in self._slots:
            slot.process.begin_stop()
        for slot in self._slots:
            slot.process.stop()

    def _spawn(self, number: int, device: str) -> ChildProcess:
        command = [sys.executable, "-m", "calotype_worker", "--model", self.model, "--device", device]
        command += ["--grace-seconds", str(_DRAIN_SECONDS)]
        log = self._log_dir / f"worker-{number}.log"
        return ChildProcess(
            f"worker-{number}", command, log=log, environment=self._environment, grace_seconds=_GRACE_SECONDS
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
