"""`Reaper`: periodic tasks that any worker can do for all.

It requeues jobs whose workers no longer renew their leases, deletes files of uncommitted attempts, and reports jobs
that are too new for this version.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence

from calotype_shared.errors import ServiceUnavailable
from calotype_shared.observability import metric_names as names
from calotype_shared.queue.job_store import JobStore, Reaped
from calotype_shared.storage.s3 import Storage
from calotype_worker.jobs.sweep import sweep
from calotype_worker.observability.counters import Counters

log = logging.getLogger(__name__)

_SWEEP_LEASES = 3.0  # an attempt's folder is kept for this many leases after its end


class Reaper:
    """Each worker has one, which runs every `every_seconds` on average; the store lets only one at a time reap."""

    def __init__(
        self,
        store: JobStore,
        storage: Storage,
        *,
        worker: str,
        queues: Sequence[str],
        lease_seconds: float,
        every_seconds: float,
        counters: Counters,
    ) -> None:
        self._store = store
        self._storage = storage
        self._worker = worker
        self._queues = tuple(queues)
        self._every_seconds = every_seconds
        self._sweep_after = _SWEEP_LEASES * lease_seconds
        self._counters = counters
        self._told_of: set[str] = set()
        self.left_for_newer: tuple[str, ...] = ()  # queues whose next job is too new for this version

    def start(self) -> None:
        threading.Thread(target=self._run, name="calotype-reaper", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self._every_seconds * random.uniform(0.5, 1.5))
            try:
                self._look_for_newer()
                reaped = self._store.reap(who=self._worker)
                if reaped is not None:
                    self._tell(reaped)
                    sweep(self._store, self._storage, older_than_seconds=self._sweep_after)
            except ServiceUnavailable:
                continue  # the heartbeat tells of it
            except Exception:
                log.exception("unexpected error in the reaper")

    def _tell(self, reaped: Reaped) -> None:
        self._counters.count(names.LEASE_REAPS, "requeued", by=len(reaped.requeued))
        self._counters.count(names.LEASE_REAPS, "failed", by=len(reaped.failed))
        self._counters.count(names.GAP_REPUBLISH, by=reaped.republished)
        if reaped.requeued or reaped.failed or reaped.republished:
            log.info(
                "jobs reaped",
                extra={
                    "requeued": ",".join(reaped.requeued),
                    "failed": ",".join(reaped.failed),
                    "republished": reaped.republished,
                },
            )

    def _look_for_newer(self) -> None:
        """Jobs that this version does not support are left to others: logged once, and reported while it lasts."""
        found = self._store.left_for_newer(self._queues)
        for queue, schema in found.items():
            if queue not in self._told_of:
                remedy = "they stay queued for a worker of a newer version; upgrade the workers"
                log.warning(
                    "jobs are too new for this worker",
                    extra={"queue": queue, "schema": schema, "known": self._store.schema, "remedy": remedy},
                )
        self._told_of |= found.keys()
        self.left_for_newer = tuple(found)
