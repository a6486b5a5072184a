"""`JobWaiter`: checks jobs for the waits of one client, sync or async, and reports why results are late."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from calotype.waiting import Waiting
from calotype_shared.errors import WaitTimeout
from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import JobRecord

_WORKER_CHECK_SECONDS = 5.0  # between checks whether any worker serves the awaited jobs


class JobWaiter:
    """Stateless and thread-safe: each wait is a `Waiting`, owned by the loop that called `begin`.

    A loop that sleeps itself calls `look` until the wait is done, and sleeps `pause` seconds in between.
    """

    def __init__(
        self, store: JobStore, *, on_warning: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._on_warning = on_warning
        self._clock = clock

    def begin(self, job_ids: Sequence[str], *, timeout: float | None = None) -> Waiting:
        """The state of a new wait."""
        return Waiting(job_ids, started=self._clock(), timeout=timeout)

    def look(self, waiting: Waiting) -> list[JobRecord]:
        """One round trip of a wait: the records that changed.

        Raises:
            JobNotFound: a job has no record.
            WaitTimeout: the wait's time is over; the jobs continue.
        """
        now = self._clock()
        window = waiting.window
        changed = waiting.update(window, self._store.get_many(window)) if window else []
        if waiting.expired(now):
            raise WaitTimeout(self._why_late(waiting))
        if not waiting.warned and now >= waiting.next_worker_check:
            waiting.next_worker_check = now + _WORKER_CHECK_SECONDS
            if unserved := self._unserved(waiting):
                waiting.warned = True
                self._on_warning(unserved)
        return changed

    def pause(self, waiting: Waiting, *, live: bool = False) -> float:
        """Seconds to sleep before the next `look`; `live` as for `Waiting.pause`."""
        return waiting.pause(self._clock(), live=live)

    def _unserved(self, waiting: Waiting) -> str:
        """A sentence about queued jobs whose models no live worker serves; empty if there are none."""
        queued = {(r.config.models, r.schema_number) for r in waiting.unfinished if r.state is JobState.QUEUED}
        if not queued:
            return ""
        served = [(set(worker.models), worker.schema_number) for worker in self._store.workers()]
        missing = sorted(models for models, _ in queued if not any(set(models) <= own for own, _ in served))
        if not missing:
            newest = {models: max((known for own, known in served if set(models) <= own)) for models, _ in queued}
            too_new = sorted(models for models, number in queued if number > newest[models])
            if not too_new:
                return ""
            return (
                f"every live worker of {'+'.join(too_new[0])!r} is of an older version than the job: it stays queued "
                "until one of a newer version is there; upgrade the workers"
            )
        return (
            f"no live worker serves {', '.join(repr('+'.join(models)) for models in missing)}: the job stays queued "
            f"until one does; start one with: calotype worker {' '.join(f'--model {name}' for name in missing[0])}"
        )

    def _why_late(self, waiting: Waiting) -> str:
        left = waiting.unfinished
        states = ", ".join(f"{record.id} is {record.state.value} ({record.progress:.0%})" for record in left[:3])
        advice = self._unserved(waiting) or "wait longer, or cancel"
        return f"{waiting.unfinished_count} job(s) not finished after {waiting.timeout:g} s: {states}; {advice}"
