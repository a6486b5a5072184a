"""The state of one wait for jobs: which are unfinished, what changed, when to look again. No I/O and no clock here.

The sync and the async client drive the same object, so the logic exists once.
"""

from __future__ import annotations

from collections.abc import Sequence

from calotype_shared.errors import JobNotFound
from calotype_shared.jobs import JobRecord

_WINDOW = 500  # jobs looked at in one round trip; the rest wait their turn, oldest first
_FIRST_PAUSE = 0.01  # seconds; for many jobs more, so that a wait reads about 200 records a second at most
_FIRST_PAUSE_A_JOB = 0.005
_LONGEST_PAUSE = 1.0
_GROWTH = 1.2  # so an end is noticed late by a fifth of the time since the last change, at most


class Waiting:
    """Owned by the one loop that drives it: look at `window`, `observe` what was found, sleep `pause` seconds."""

    def __init__(self, job_ids: Sequence[str], *, started: float, timeout: float | None) -> None:
        self.started = started
        self.timeout = timeout
        self.warned = False  # whether the lack of a worker was already told
        self.next_worker_check = started
        self.final: dict[str, JobRecord] = {}
        self._unfinished: dict[str, JobRecord | None] = dict.fromkeys(job_ids)  # as last seen, in order
        self._pause = self._first_pause

    @property
    def window(self) -> list[str]:
        """The jobs to look at now."""
        return [job_id for job_id, _ in zip(self._unfinished, range(_WINDOW), strict=False)]

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

    def observe(self, job_ids: Sequence[str], records: Sequence[JobRecord | None]) -> list[JobRecord]:
        """Take in what was found; returns the records that differ from the last look.

        Raises:
            JobNotFound: a job has no record.
        """
        changed = []
        for job_id, record in zip(job_ids, records, strict=True):
            if record is None:
                raise JobNotFound(no_such_job(job_id))
            if record != self._unfinished.get(job_id):
                changed.append(record)
            if record.state.final:
                self._unfinished.pop(job_id, None)
                self.final[job_id] = record
            else:
                self._unfinished[job_id] = record
        # Something moved: look again soon. Otherwise ever more gently.
        self._pause = self._first_pause if changed else min(_LONGEST_PAUSE, self._pause * _GROWTH)
        return changed

    @property
    def _first_pause(self) -> float:
        return min(_LONGEST_PAUSE, max(_FIRST_PAUSE, _FIRST_PAUSE_A_JOB * min(_WINDOW, len(self._unfinished))))

    def expired(self, now: float) -> bool:
        return self.timeout is not None and not self.done and now - self.started >= self.timeout

    def pause(self, now: float) -> float:
        """Seconds to sleep before the next look; never past the time-out."""
        if self.timeout is None:
            return self._pause
        return max(0.0, min(self._pause, self.started + self.timeout - now))


def no_such_job(job_id: str) -> str:
    return f"no job {job_id!r}: it was never created under this key prefix, or its record has expired; check the id"
