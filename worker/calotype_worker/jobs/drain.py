"""`Drain`: stops a worker. Jobs get a grace period; then the unfinished ones are returned to the queue."""

from __future__ import annotations

import faulthandler
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
EXIT_STUCK = 70  # after the grace period a device, the storage or Redis did not let the worker end
_LEAVE_NOW_SECONDS = 0.6
_HAND_BACK_SECONDS = 5.0  # time reserved before the machine is reclaimed, for returning unfinished jobs
_RETURN_SECONDS = 15.0  # after the grace period, for returning jobs
_END_SECONDS = 10.0  # after that, for ending the process
_LOOK_SECONDS = 0.05


class Drain:
    """Started by a signal in the main thread or a notice in the watcher's thread; each drains in its own thread."""

    def __init__(self, store: JobStore, heartbeat: Heartbeat, *, worker: str, grace_seconds: float) -> None:
        self._store = store
        self._heartbeat = heartbeat
        self._worker = worker
        self._grace_seconds = grace_seconds
        self._begun = threading.Event()
        self._signals = 0  # of the main thread alone

    @property
    def begun(self) -> bool:
        """Whether this worker has stopped accepting jobs."""
        return self._begun.is_set()

    def on_signal(self, number: int, _: object) -> None:
        """A handler for SIGTERM and SIGINT: the first signal drains; a second one exits within a second."""
        # No logging here, because the interrupted code may hold the logger's lock.
        self._signals += 1
        if self._signals > 1:
            threading.Thread(target=self._leave_now, args=(EXIT_NOW,), daemon=True).start()
        else:
            self._begin(signal.Signals(number).name, self._grace_seconds)

    def on_notice(self, notice: Notice) -> None:
        """Does not count as a signal: the one sent when the machine shuts down is the first."""
        within = max(0.0, notice.seconds_left - _HAND_BACK_SECONDS)
        self._begin(f"preemption notice ({notice.where})", min(self._grace_seconds, within))

    def wait_for_jobs(self, *, until: float = float("inf")) -> None:
        """Until no job is running, or the monotonic clock shows `until`."""
        while self._heartbeat.running() and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)

    def _begin(self, reason: str, grace_seconds: float) -> None:
        """May be called from any thread or signal handler, repeatedly: the earliest end counts."""
        self._begun.set()
        celery_state.should_stop = 0  # Celery's warm shutdown: stop consuming, wait for running tasks, exit status 0
        threading.Thread(target=self._run, args=(reason, grace_seconds), daemon=True).start()

    def _run(self, reason: str, grace_seconds: float) -> None:
        holding = len(self._heartbeat.running())
        log.info("worker drains", extra={"reason": reason, "jobs": holding, "grace": grace_seconds})
        self.wait_for_jobs(until=time.monotonic() + grace_seconds)
        self._heartbeat.release_all()
        self.wait_for_jobs(until=time.monotonic() + _RETURN_SECONDS)
        if stuck := len(self._heartbeat.running()):
            log.critical("worker exits: jobs do not end", extra={"worker": self._worker, "jobs": stuck})
            faulthandler.dump_traceback()  # where each thread waits
            self._leave_now(EXIT_STUCK)
        time.sleep(_END_SECONDS)  # this thread ends with the process
        log.critical("worker exits: it does not end by itself", extra={"worker": self._worker})
        faulthandler.dump_traceback()
        self._leave_now(EXIT_STUCK)

    def _leave_now(self, status: int) -> None:
        """Return the jobs that can be returned immediately, and exit."""
        releasing = threading.Thread(target=self._release_directly, daemon=True)
        releasing.start()
        releasing.join(_LEAVE_NOW_SECONDS)
        os._exit(status)

    def _release_directly(self) -> None:
        for job in self._heartbeat.running():
            self._store.release(job.claim)
        self._store.retire_worker(self._worker)
