"""The state of one wait for jobs: which are unfinished, what changed, when to check again. Has no I/O and no clock.

The sync and the async client drive the same object, so the logic exists once.
"""

from __future__ import annotations

from collections.abc import Sequence

from calotype_shared.errors import no_such_job
from calotype_shared.schema.jobs import JobRecord

_WINDOW = 500  # jobs looked at in one round trip; the rest wait their turn, oldest first
_MOST_TOLD = 64  # maximum number of unfinished jobs subscribed to; more would be checked too rarely to benefit
_LATENESS = 0.05  # maximum delay in noticing a final state, as a share of the time waited so far
_SHORTEST_PAUSE = 0.01  # seconds
_PAUSE_A_JOB = 0.005  # a wait reads at most two hundred records a second
_LONGEST_PAUSE = 1.0


class Waiting:
    """Owned by the one loop that drives it: look at `window`, `update` what was found, sleep `pause` seconds.

    Or less, if something has changed about the jobs in `subscribed_ids`; but `min_interval` seconds.
    """

    def __init__(self, job_ids: Sequence[str], *, started: float, timeout: float | None) -> None:
        self.started = started
        self.timeout = timeout
        self.warned = False  # whether the lack of a worker has been reported
        self.next_worker_check = started
        self.final: dict[str, JobRecord] = {}
        self._unfinished: dict[str, JobRecord | None] = dict.fromkeys(job_ids)  # as last seen, in order
        self._behind = False  # all checked jobs were final: the following ones may be, too

    @property
    def window(self) -> list[str]:
        """The jobs to check now."""
        return [job_id for job_id, _ in zip(self._unfinished, range(_WINDOW), strict=False)]

    @property
    def subscribed_ids(self) -> list[str]:
        """The jobs to subscribe to."""
        return list(self._unfinished) if len(self._unfinished) <= _MOST_TOLD else []

    @property
    def done(self) -> bool:
        return not self._unfinished

    @property
    def unfinished(self) -> list[JobRecord]:
        """The unfinished jobs that have been looked at, as last seen."""
        return [record for record in self._unfinished.values() if record is not None]

    @property
    def unfinished_count(self) -> int:
        return len(self._unfinished)

    def update(self, job_ids: Sequence[str], records: Sequence[JobRecord | None]) -> list[JobRecord]:
        """Apply the records that were read; returns those that changed since the last check.

        Raises:
            JobNotFound: a job has no record.
        """
        changed = []
        for job_id, record in zip(job_ids, records, strict=True):
            if record is None:
                raise no_such_job(job_id)
            if record != self._unfinished.get(job_id):
                changed.append(record)
            if record.state.final:
                self._unfinished.pop(job_id, None)
                self.final[job_id] = record
            else:
                self._unfinished[job_id] = record
        self._behind = all(job_id in self.final for job_id in job_ids)
        return changed

    def expired(self, now: float) -> bool:
        return self.timeout is not None and not self.done and now - self.started >= self.timeout

    @property
    def min_interval(self) -> float:
        """Seconds between two checks."""
        if self._behind:
            return 0.0
        return min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, _PAUSE_A_JOB * len(self._unfinished)))

    def pause(self, now: float, *, live: bool = False) -> float:
        """Seconds to sleep before the next check, never past the timeout. `live`: change notices arrive meanwhile."""
        if self._behind:
            return 0.0
        late = _LONGEST_PAUSE if live else _LATENESS * (now - self.started)
        pause = min(_LONGEST_PAUSE, max(self.min_interval, late))
        if self.timeout is None:
            return pause
        return max(0.0, min(pause, self.started + self.timeout - now))
