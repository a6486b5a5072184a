"""`Heartbeat`: renews running jobs' leases, reports progress, and learns of lost claims and interactive jobs.

Runs beside the step loop in its own threads, so that neither a busy device nor a slow upload can delay a renewal.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from calotype_shared.backoff import full_jitter
from calotype_shared.errors import ServiceUnavailable
from calotype_shared.observability import metric_names as names
from calotype_shared.queue.job_store import Claim, JobStore, News
from calotype_worker.observability.counters import Counters

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.3
_REPORT_SECONDS = 1.0
_LISTEN_SECONDS = 1.0
_BACKOFF_SECONDS = 2.0
_LOOK_SECONDS = 0.2


@dataclass(kw_only=True, eq=False)
class RunningJob:
    """A job that this process works on. `lost` and `released` are set once and never cleared."""

    claim: Claim
    request_ids: tuple[str, ...]
    lost: bool = False  # cancelled, or claimed by another worker: this attempt's results do not count
    released: bool = False  # we are leaving and hand it back
    shown: tuple[int, int] = field(default=(0, 0))  # progress last written

    @property
    def given_up(self) -> bool:
        return self.lost or self.released

    def wait_given_up(self, seconds: float) -> bool:
        """Sleep, but wake up soon after the job is given up. Returns whether it is."""
        ends = time.monotonic() + seconds
        while not self.given_up and (left := ends - time.monotonic()) > 0:
            time.sleep(min(_LOOK_SECONDS, left))
        return self.given_up


class Heartbeat:
    """`progress(request_id)` returns the progress of one image; `stop_request(request_id)` removes it from the engine.

    `on_interactive` is called when a job has arrived in one of `interactive_queues`.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        lease_seconds: float,
        progress: Callable[[str], tuple[int, int] | None],
        stop_request: Callable[[str], object],
        report: Callable[[], None],
        interactive_queues: Sequence[str] = (),
        on_interactive: Callable[[], None] = lambda: None,
        counters: Counters | None = None,
    ) -> None:
        self._store = store
        self._lease_seconds = lease_seconds
        self._progress = progress
        self._stop_request = stop_request
        self._report = report  # announces the worker itself
        self._interactive_queues, self._on_interactive = tuple(interactive_queues), on_interactive
        self._counters = counters or Counters()
        self._turned_at = time.monotonic()  # the last round of `_beat`, whether or not Redis answered
        self._lock = threading.Lock()
        self._jobs: dict[str, RunningJob] = {}
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._beat, name="calotype-heartbeat", daemon=True),
            threading.Thread(target=self._listen, name="calotype-news", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()

    @property
    def silent_seconds(self) -> float:
        """Since the thread that renews leases has begun a round."""
        return time.monotonic() - self._turned_at

    def hold(self, claim: Claim, request_ids: Sequence[str]) -> RunningJob:
        """Renew this claim until `drop`."""
        job = RunningJob(claim=claim, request_ids=tuple(request_ids))
        with self._lock:
            self._jobs[claim.job_id] = job
        return job

    def drop(self, job: RunningJob) -> None:
        with self._lock:
            if self._jobs.get(job.claim.job_id) is job:
                del self._jobs[job.claim.job_id]

    def running(self) -> list[RunningJob]:
        with self._lock:
            return list(self._jobs.values())

    def release_all(self) -> None:
        """Give up all remaining jobs: their requests leave the engine, and their threads return them to the queue."""
        for job in self.running():
            job.released = True
            self._stop(job)

    def _beat(self) -> None:
        renew_every = self._lease_seconds / 4
        renewed = reported = 0.0
        while not self._stopped.wait(_PROGRESS_SECONDS):
            self._turned_at = time.monotonic()
            try:
                self._show_progress()
                if time.monotonic() - renewed >= renew_every:
                    self._renew()
                    renewed = time.monotonic()
                if time.monotonic() - reported >= _REPORT_SECONDS:
                    self._report()
                    reported = time.monotonic()
            except ServiceUnavailable as error:
                log.warning("heartbeat missed", extra={"reason": str(error)})
                self._stopped.wait(full_jitter(_BACKOFF_SECONDS))
            except Exception:  # this thread must not die: the leases of good jobs depend on it
                log.exception("unexpected error in the heartbeat")

    def _show_progress(self) -> None:
        updates = []
        for job in self.running():
            known = [self._progress(request_id) for request_id in job.request_ids]
            present = [progress for progress in known if progress is not None]
            if not present:
                continue
            total = present[0][1]  # all images of a job have the same number of steps
            # An image the engine no longer has is done with its steps.
            done = sum(step for step, _ in present) + total * (len(known) - len(present))
            if (done, total * len(known)) != job.shown:
                job.shown = (done, total * len(known))
                updates.append((job.claim, *job.shown))
        self._store.progress(updates)

    def _renew(self) -> None:
        holding = self.running()
        lost = self._store.renew([job.claim for job in holding], lease_seconds=self._lease_seconds)
        self._counters.count(names.LEASE_RENEWALS, by=len(holding) - len(lost))
        for job in holding:
            if job.claim.job_id in lost:
                self._lose(job)

    def _listen(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._store.news(*self._interactive_queues) as wait:
                    while not self._stopped.is_set():
                        self._heard(wait(_LISTEN_SECONDS))
            except ServiceUnavailable:
                self._stopped.wait(full_jitter(_BACKOFF_SECONDS))  # the heartbeat reports it
            except Exception:
                log.exception("unexpected error while listening for events")
                self._stopped.wait(_BACKOFF_SECONDS)

    def _heard(self, news: News | None) -> None:
        if news is None:
            return
        if news.kind == "arrived":
            self._on_interactive()
            return
        with self._lock:
            job = self._jobs.get(news.about)
        if job is not None:
            self._lose(job)

    def _lose(self, job: RunningJob) -> None:
        with self._lock:
            known, job.lost = job.lost, True
        if not known:  # the listener and a renewal may both detect it
            self._counters.count(names.LOST_CLAIMS)
            log.info("claim lost", extra={"job_id": job.claim.job_id, "attempt": job.claim.attempt})
        self._stop(job)

    def _stop(self, job: RunningJob) -> None:
        for request_id in job.request_ids:
            self._stop_request(request_id)
