"""The state of one wait for batches. No I/O and no clock here: the sync and the async client drive the same object."""

from __future__ import annotations

from collections.abc import Sequence

from calotype.batches.record import BatchRecord
from calotype_shared.errors import WaitTimeout

POLL_SECONDS = 0.25


class BatchWaiting:
    """Owned by the one loop that drives it: look at each of `unfinished`, `update`, sleep `POLL_SECONDS`."""

    def __init__(self, batch_ids: Sequence[str], *, started: float, timeout: float | None) -> None:
        self._ends = None if timeout is None else started + timeout
        self._timeout = timeout
        self._unfinished = dict.fromkeys(batch_ids)
        self._ids = list(batch_ids)
        self._final: dict[str, BatchRecord] = {}

    @property
    def unfinished(self) -> list[str]:
        return list(self._unfinished)

    @property
    def records(self) -> list[BatchRecord]:
        """The final records, in the order of the ids; once none is unfinished."""
        return [self._final[batch_id] for batch_id in self._ids]

    def update(self, record: BatchRecord, now: float) -> None:
        """Process the records that were read.

        Raises:
            WaitTimeout: the wait timed out; the batch continues.
        """
        if record.state.final:
            del self._unfinished[record.id]
            self._final[record.id] = record
        elif self._ends is not None and now >= self._ends:
            raise WaitTimeout(
                f"batch {record.id} is still {record.state.value} after {self._timeout:g} s "
                f"({record.counts.done} of {record.counts.total} lines done); wait longer, or cancel it; "
                "if nothing moves, start a dispatcher: calotype dispatcher"
            )
