"""`running_groups`: what an engine is working on, for the worker's report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from calotype_shared.schema.worker_info import StepGroup, StepRow
from calotype_worker.engine.request_state import RequestState
from calotype_worker.engine.step_batch import StepBatch
from calotype_worker.request import GroupKey

_GROUPS = 8
_ROWS = 64  # over all groups: a report is written every second and read by every client that watches


def running_groups(
    states: Iterable[RequestState], batches: Mapping[GroupKey, StepBatch], budget: Callable[[GroupKey], int]
) -> tuple[StepGroup, ...]:
    """The groups with the most images, and their first rows. The counts include all groups.

    Thread-safe. The engine continues meanwhile, so two numbers may be one step apart. `states` and `batches` must be
    the caller's own copies.
    """
    groups: dict[GroupKey, list[RequestState]] = {}
    for state in states:
        groups.setdefault(state.group, []).append(state)
    split = [(key, *_split(members, batches.get(key))) for key, members in groups.items()]
    busiest = sorted(split, key=lambda one: len(one[1]), reverse=True)[:_GROUPS]
    shown = iter(range(_ROWS))
    return tuple(
        StepGroup(
            model=key.model,
            width=(running or others)[0].request.width,
            height=(running or others)[0].request.height,
            budget=budget(key),
            running=len(running),
            waiting=sum(1 for state in others if not state.denoised),
            decoding=sum(1 for state in others if state.denoised),
            rows=tuple(_row(state) for state, _ in zip(running, shown, strict=False)),
        )
        for key, running, others in busiest
    )


def _split(members: list[RequestState], batch: StepBatch | None) -> tuple[list[RequestState], list[RequestState]]:
    """The requests in the step batch, in the order of its rows, and those that are not in it: yet, or any more."""
    left = {state.id: state for state in members}
    placed = [row.request.request_id for row in tuple(batch.members)] if batch else []
    placed += [state.id for state in members if not state.stages and state.admitted]  # a whole run of a pipeline
    running = [left.pop(request_id) for request_id in placed if request_id in left]
    return running, list(left.values())


def _row(state: RequestState) -> StepRow:
    # A worker's id of an image is `{job}/{attempt}-{token}/{image}`; the token must not leave the worker.
    job, _, rest = state.id.partition("/")
    image = rest.rpartition("/")[2]
    return StepRow(
        job=job,
        image=int(image) if image.isdecimal() else 0,
        step=state.steps_done,
        total_steps=state.total_steps,
        guided=bool(state.stages) and state.row.guided,
    )
