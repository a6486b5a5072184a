"""`RunningGroup` and `RunningRow`: what an engine works on at this moment, for people who watch it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from calotype_worker.engine.request_state import RequestState
from calotype_worker.engine.step_batch import StepBatch
from calotype_worker.request import GroupKey


@dataclass(frozen=True, kw_only=True)
class RunningRow:
    """One request in a step batch. A guided one takes two rows of the forward pass."""

    request_id: str
    step: int  # network evaluations done, over all its stages
    total_steps: int
    guided: bool


@dataclass(frozen=True, kw_only=True)
class RunningGroup:
    """A group's step batch in the order of its rows, and how many requests are not in it: yet, or any more."""

    model: str
    width: int  # pixels
    height: int
    budget: int  # rows of a step, at most
    rows: tuple[RunningRow, ...]
    waiting: int  # for a place
    decoding: int  # done with their steps


def running_groups(
    states: Iterable[RequestState], batches: Mapping[GroupKey, StepBatch], budget: Callable[[GroupKey], int]
) -> list[RunningGroup]:
    """For any thread. The engine's own goes on meanwhile, so two numbers may be a step apart.

    `states` and `batches` are the caller's own copies.
    """
    groups: dict[GroupKey, list[RequestState]] = {}
    for state in states:
        groups.setdefault(state.group, []).append(state)
    return [_group(key, members, batches.get(key), budget(key)) for key, members in groups.items()]


def _group(key: GroupKey, members: list[RequestState], batch: StepBatch | None, budget: int) -> RunningGroup:
    left = {state.id: state for state in members}
    placed = [row.request.request_id for row in tuple(batch.members)] if batch else []
    placed += [state.id for state in members if not state.stages and state.admitted]  # a whole run of a pipeline
    rows = [_row(left.pop(request_id)) for request_id in placed if request_id in left]
    decoding = sum(1 for state in left.values() if state.denoised)
    size = members[0].request
    return RunningGroup(
        model=key.model,
        width=size.width,
        height=size.height,
        budget=budget,
        rows=tuple(rows),
        waiting=len(left) - decoding,
        decoding=decoding,
    )


def _row(state: RequestState) -> RunningRow:
    return RunningRow(
        request_id=state.id,
        step=state.steps_done,
        total_steps=state.total_steps,
        guided=bool(state.stages) and state.row.guided,
    )
