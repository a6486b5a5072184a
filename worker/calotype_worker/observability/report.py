"""`step_groups`: what the engine works on, as a worker's report tells it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from calotype_shared.schema.worker_info import StepGroup, StepRow
from calotype_worker.engine.running import RunningGroup, RunningRow

_GROUPS = 8
_ROWS = 64  # over all groups: a report is written every second and read by everyone who watches


def step_groups(running: Iterable[RunningGroup]) -> tuple[StepGroup, ...]:
    """The groups with the most images, and their first rows."""
    busiest = sorted(running, key=lambda group: len(group.rows), reverse=True)[:_GROUPS]
    left = itertools.islice(itertools.count(), _ROWS)
    return tuple(
        StepGroup(
            model=group.model,
            width=group.width,
            height=group.height,
            budget=group.budget,
            running=len(group.rows),
            waiting=group.waiting,
            decoding=group.decoding,
            rows=tuple(_row(row) for row, _ in zip(group.rows, left, strict=False)),
        )
        for group in busiest
    )


def _row(row: RunningRow) -> StepRow:
    # The engine knows an image as `{job}/{attempt}-{token}/{image}`; the token is the worker's own affair.
    job, _, rest = row.request_id.partition("/")
    return StepRow(
        job=job,
        image=int(rest.rpartition("/")[2] or 0),
        step=row.step,
        total_steps=row.total_steps,
        guided=row.guided,
    )
