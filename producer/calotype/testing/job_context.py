"""`JobContext`: one attempt at a job, as a script sees it."""

from __future__ import annotations

import threading
import time

from calotype_shared.queue.job_store import Claim, JobStore
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.jobs import JobRecord

_RENEW_SECONDS = 0.05  # how soon a cancellation is noticed


class ClaimLost(Exception):
    """The job was cancelled, its lease ran out, or the worker is to stop. Let it pass: the worker deals with it."""


class WorkerCrash(Exception):
    """For a script to raise: the worker drops the job silently, as if its process had died.

    When its lease has expired, the job is claimed again.
    """


class JobContext:
    """An attempt at a job, for the time of its script. Owned by the worker's thread, in which the script runs."""

    def __init__(self, store: JobStore, claim: Claim, *, lease_seconds: float, stopped: threading.Event) -> None:
        self._store = store
        self._lease_seconds = lease_seconds
        self._stopped = stopped
        self.claim = claim

    @property
    def job(self) -> JobRecord:
        """The job as it was claimed. `job.attempt` counts its claims, from 1."""
        return self.claim.record

    @property
    def config(self) -> GenerationConfig:
        """The job's complete config."""
        return self.claim.config

    @property
    def total_steps(self) -> int:
        """Of all its images together."""
        return self.config.image_count * self.config.num_inference_steps

    def progress(self, step: int) -> None:
        """Report that `step` of `total_steps` are done. Raises ClaimLost."""
        self.renew()
        self._store.progress([(self.claim, step, self.total_steps)])

    def wait(self, seconds: float) -> None:
        """Work for `seconds`. Raises ClaimLost as soon as the job is cancelled."""
        self._wait(threading.Event(), seconds)

    def wait_for(self, event: threading.Event, timeout: float = 60.0) -> None:
        """Work until another thread sets the event. Raises ClaimLost, or TimeoutError after `timeout` seconds."""
        if not self._wait(event, timeout):
            raise TimeoutError(f"nothing set the event within {timeout:g} s; set it, or raise the timeout")

    def renew(self) -> None:
        """Lengthen the lease. Raises ClaimLost."""
        if self._stopped.is_set():
            raise ClaimLost(f"the worker is to stop, and hands job {self.claim.job_id} back")
        if self._store.renew([self.claim], lease_seconds=self._lease_seconds):
            raise ClaimLost(f"job {self.claim.job_id} was cancelled, or its lease ran out")

    def _wait(self, event: threading.Event, seconds: float) -> bool:
        ends = time.monotonic() + seconds
        while True:
            self.renew()
            left = ends - time.monotonic()
            if event.wait(max(0.0, min(_RENEW_SECONDS, left))):
                return True
            if left <= 0:
                return False
