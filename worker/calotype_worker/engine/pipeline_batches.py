"""`PipelineBatches`: requests of pipelines in the engine, from admission to their outputs."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from calotype_shared.errors import InvalidRequest
from calotype_worker.engine.call_batch import CallBatch
from calotype_worker.engine.pipeline_run import PipelineRun
from calotype_worker.engine.request_state import RequestState
from calotype_worker.engine.row_budget import RowBudgets
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pipeline.outputs import Output
from calotype_worker.request import GroupKey

_STARTED = 2  # requests per call: tokenizers and checks take the engine's thread tens of milliseconds


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """The result of one merged call. Requests in `ended` have left their batch."""

    ended: Sequence[tuple[RequestState, Output | Exception]]
    joined: int
    previews: Sequence[tuple[RequestState, int, np.ndarray]]  # with the step; uint8 (h, w, 3)
    component: str
    calls: int
    rows: int
    padding_rows: int = 0
    compiled: bool = False
    fallback_steps: int = 0


@dataclass(kw_only=True, eq=False)
class _Batch:
    model: PipelineModel
    calls: CallBatch
    starting: deque[RequestState] = field(default_factory=deque)
    states: dict[str, RequestState] = field(default_factory=dict)  # by request, those that have started
    runs: dict[str, PipelineRun] = field(default_factory=dict)


class PipelineBatches:
    """Owned by the engine's thread, in which all code of pipelines runs."""

    def __init__(self, budgets: RowBudgets) -> None:
        self._budgets = budgets
        self._batches: dict[GroupKey, _Batch] = {}

    def admit(self, model: PipelineModel, group: GroupKey, states: Sequence[RequestState]) -> None:
        """They start with the group's next steps."""
        if states and group not in self._batches:
            self._batches[group] = _Batch(model=model, calls=self._call_batch(model, group))
        if states:
            self._batches[group].starting.extend(states)

    def step(self, group: GroupKey) -> PipelineReport | None:
        """Start a few of the admitted requests, then execute one merged call. None: the group has none."""
        batch = self._batches.get(group)
        if batch is None:
            return None
        # Pipelines write into tensors of their own, which those of inference mode would refuse outside of it.
        with torch.inference_mode(False), torch.no_grad():
            joined = 0
            while batch.starting and joined < _STARTED:
                self._start(batch, batch.starting.popleft())
                joined += 1
            report = batch.calls.step()
            ended = [] if report is None else [self._end(batch, run) for run in report.ended]
        if not batch.calls.runs and not batch.starting:
            del self._batches[group]
        previews = []
        for run in batch.calls.runs:
            state = batch.states[run.request_id]
            previews += [(state, step, image) for step, image in run.take_previews()]
            state.steps_before = run.steps_done
            state.total_steps = max(state.total_steps, run.total_steps)
        return PipelineReport(
            ended=ended,
            joined=joined,
            previews=previews,
            component="" if report is None else report.place[0],
            calls=0 if report is None else report.calls,
            rows=0 if report is None else report.rows,
        )

    def leave(self, state: RequestState) -> None:
        """Remove a request in any state. Its run ends where it is suspended; the others continue."""
        batch = self._batches.get(state.group)
        if batch is None:
            return
        if state in batch.starting:
            batch.starting.remove(state)
        run = batch.runs.pop(state.id, None)
        batch.states.pop(state.id, None)
        if run is not None:
            with torch.inference_mode(False), torch.no_grad():
                batch.calls.leave(run)
        if not batch.calls.runs and not batch.starting:
            del self._batches[state.group]

    def close(self) -> None:
        """End all runs."""
        for batch in self._batches.values():
            for run in list(batch.calls.runs):
                with torch.inference_mode(False), torch.no_grad():
                    batch.calls.leave(run)
        self._batches.clear()

    def _call_batch(self, model: PipelineModel, group: GroupKey) -> CallBatch:
        rows = self._budgets.max(group)
        return CallBatch(
            model.calls,
            order=model.order,
            max_rows=rows,
            limit=lambda place: self._budgets.limit((group, place), rows),
            split=model.split,
        )

    def _start(self, batch: _Batch, state: RequestState) -> None:
        request = state.request
        run = PipelineRun(
            state.id,
            seed=request.seed,
            watched=batch.model.watched(request),
            preview=functools.partial(batch.model.preview, request),
            preview_every=request.preview_every,
        )
        run.work = batch.model.start(request, run.follow)
        batch.states[state.id], batch.runs[state.id] = state, run
        batch.calls.join(run)

    def _end(self, batch: _Batch, run: PipelineRun) -> tuple[RequestState, Output | Exception]:
        state = batch.states.pop(run.request_id)
        del batch.runs[run.request_id]
        state.steps_before = run.steps_done
        state.total_steps = run.total_steps or run.steps_done
        if run.error is not None:
            if isinstance(run.error, ValueError | TypeError) and not run.calls:
                # The pipeline's own checks of its arguments.
                return state, InvalidRequest(
                    f"the pipeline refuses it ({run.error})",
                    field="config",
                    value=type(run.error).__name__,
                    remedy="change what it names",
                )
            return state, run.error
        if not run.changed:
            batch.model.found_plain(state.request)
        try:
            return state, batch.model.read(run.result)
        except Exception as error:
            return state, error
