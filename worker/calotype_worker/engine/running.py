"""`RunningGroup` and `RunningRow`: what an engine works on at this moment, for people who watch it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from calotype_worker.engine.step_batch import StepBatch
from calotype_worker.engine.ticket import Ticket
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
    tickets: Iterable[Ticket], batches: Mapping[GroupKey, StepBatch], budget: Callable[[GroupKey], int]
) -> list[RunningGroup]:
    """For any thread. The engine's own goes on meanwhile, so two numbers may be a step apart.

    `tickets` and `batches` are the caller's own copies.
    """
    groups: dict[GroupKey, list[Ticket]] = {}
    for ticket in tickets:
        groups.setdefault(ticket.group, []).append(ticket)
    return [_group(key, members, batches.get(key), budget(key)) for key, members in groups.items()]


def _group(key: GroupKey, members: list[Ticket], batch: StepBatch | None, budget: int) -> RunningGroup:
    left = {ticket.id: ticket for ticket in members}
    placed = [slot.request.request_id for slot in tuple(batch.slots)] if batch else []
    placed += [ticket.id for ticket in members if not ticket.stages and ticket.admitted]  # a whole run of a pipeline
    rows = [_row(left.pop(request_id)) for request_id in placed if request_id in left]
    decoding = sum(1 for ticket in left.values() if ticket.denoised)
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


def _row(ticket: Ticket) -> RunningRow:
    return RunningRow(
        request_id=ticket.id,
        step=ticket.steps_done,
        total_steps=ticket.total_steps,
        guided=bool(ticket.stages) and ticket.slot.guided,
    )
