"""`StepBatches`: requests of step models in the engine, from admission to their last latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from calotype_worker.engine.admission import Admission
from calotype_worker.engine.compiled import CompiledStep, buckets_up_to
from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.engine.request_state import RequestState
from calotype_worker.engine.row_budget import RowBudgets
from calotype_worker.engine.settings import EngineSettings
from calotype_worker.engine.step_batch import StepBatch, StepReport
from calotype_worker.models.base import StepModel
from calotype_worker.request import GroupKey


class StepBatches:
    """One step batch per group that has requests. Owned by the engine's thread."""

    def __init__(self, budgets: RowBudgets, settings: EngineSettings) -> None:
        self._budgets = budgets
        self._settings = settings
        self.admission = Admission(cache_capacity=settings.conditioning_cache, together=not settings.deterministic)
        self._batches: dict[GroupKey, StepBatch] = {}
        self._graphs: dict[str, CompiledStep] = {}  # by model

    def admit(
        self, model: StepModel, group: GroupKey, states: Sequence[RequestState]
    ) -> list[tuple[RequestState, Exception]]:
        """Encode the requests' inputs and add their rows to the group. Returns those that failed."""
        outcomes = self.admission.admit(model, [state.stages[0] for state in states])
        both = list(zip(states, outcomes, strict=True))
        if ready := [state.row for state, error in both if error is None]:
            if group not in self._batches:
                self._batches[group] = self.make(model, group, self._budgets.limit(group, self._budgets.max(group)))
            self._batches[group].join(ready)
        return [(state, error) for state, error in both if error is not None]

    def has(self, group: GroupKey) -> bool:
        return group in self._batches

    def step(self, group: GroupKey) -> StepReport:
        """One denoising step of all rows of a group. Raises KeyError: the group has none."""
        batch = self._batches[group]
        report = batch.step()
        if not batch.members:
            del self._batches[group]
        return report

    def leave(self, state: RequestState) -> None:
        """Remove a request, if it is in a batch."""
        batch = self._batches.get(state.group)
        if batch is not None and any(row is state.row for row in batch.members):
            batch.leave([state.row])
            if not batch.members:
                del self._batches[state.group]

    def steps_until_next(self, model: str, shape: torch.Size) -> float:
        """In how many steps the next latents of a shape are finished; infinity if there are none."""
        running = [
            row
            for group, batch in self._batches.items()
            if group.model == model and group.step_shape == tuple(shape)
            for row in batch.members
        ]
        return min((row.total_steps - row.step for row in running), default=math.inf)

    def snapshot(self) -> Mapping[GroupKey, StepBatch]:
        """A copy, for other threads."""
        return self._batches.copy()

    def make(self, model: StepModel, group: GroupKey, limit: MemoryLimit) -> StepBatch:
        """An empty batch with the settings' row counts and graphs; it belongs to the caller."""
        graph = self._graph(model)
        most = self._budgets.max(group)
        buckets = self._settings.row_buckets
        if self._settings.deterministic:
            buckets = (most,)
        elif graph is not None and graph.static and not buckets:
            buckets = buckets_up_to(most)
        return StepBatch(
            model,
            shape=group.step_shape,
            limit=limit,
            buckets=buckets,
            exact=self._settings.deterministic,
            compiled=graph,
        )

    def _graph(self, model: StepModel) -> CompiledStep | None:
        if self._settings.compile == "off":
            return None
        name = model.card.name
        if name not in self._graphs:
            self._graphs[name] = CompiledStep(model, self._settings.compile)
        return self._graphs[name]
