"""`Drain`: how a worker leaves. Jobs get a grace period, then what is left is handed back to the queue."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

from celery.worker import state as celery_state

from calotype_shared.queue.job_store import JobStore
from calotype_worker.jobs.heartbeat import Heartbeat
from calotype_worker.jobs.preemption import Notice

log = logging.getLogger(__name__)

EXIT_NOW = 75  # a second signal
_LEAVE_NOW_SECONDS = 0.6
_HAND_BACK_SECONDS = 5.0  # before the machine is taken away, for jobs that are still running then
_LOOK_SECONDS = 0.05


class Drain:
    """Begun by a signal in the main thread or by a notice in the watcher's; each drains in a thread of its own."""

    def __init__(self, store: JobStore, heartbeat: Heartbeat, *, worker: str, grace_seconds: float) -> None:
        self._store = store
        self._heartbeat = heartbeat
        self._worker = worker
        self._grace_seconds = grace_seconds
        self._begun = threading.Event()
        self._signals = 0  # of the main thread alone

    @property
    def begun(self) -> bool:
        """Whether this worker takes no more jobs."""
        return self._begun.is_set()

    def on_signal(self, number: int, _: object) -> None:
        """A handler of SIGTERM and SIGINT: the first drains, a second one leaves within a second."""
        # No logging here: the interrupted code may hold the logger's lock.
        self._signals += 1
        if self._signals > 1:
            threading.Thread(target=self._leave_now, daemon=True).start()
        else:
            self._begin(signal.Signals(number).name, self._grace_seconds)

    def on_notice(self, notice: Notice) -> None:
        """Does not count as a signal: the one that follows, when the machine is shut down, is a first one."""
        within = max(0.0, notice.seconds_left - _HAND_BACK_SECONDS)
        self._begin(f"preemption notice ({notice.where})", min(self._grace_seconds, within))

    def wait_for_jobs(self, *, until: float = float("inf")) -> None:
        """Until no job is running, or the monotonic clock shows `until`."""
        while self._heartbeat.running() and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)

    def _begin(self, reason: str, grace_seconds: float) -> None:
        """From any thread or signal handler, and more than once: the earliest end counts."""
        self._begun.set()
        celery_state.should_stop = 0  # Celery's warm shutdown: stop consuming, wait for what runs, exit status 0
        threading.Thread(target=self._run, args=(reason, grace_seconds), daemon=True).start()

    def _run(self, reason: str, grace_seconds: float) -> None:
        holding = len(self._heartbeat.running())
        log.info("worker drains", extra={"reason": reason, "jobs": holding, "grace": grace_seconds})
        self.wait_for_jobs(until=time.monotonic() + grace_seconds)
        self._heartbeat.release_all()

    def _leave_now(self) -> None:
        """Hand back what can be handed back at once, and exit."""
        releasing = threading.Thread(target=self._release_directly, daemon=True)
        releasing.start()
        releasing.join(_LEAVE_NOW_SECONDS)
        os._exit(EXIT_NOW)

    def _release_directly(self) -> None:
        for job in self._heartbeat.running():
            self._store.release(job.claim)
        self._store.retire_worker(self._worker)
