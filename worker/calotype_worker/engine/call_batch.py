"""`CallBatch`: the running requests of one pipeline, and which of their network calls run next, together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from calotype_worker.engine.failure_isolation import run_isolating_failures
from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.engine.pipeline_run import PipelineRun
from calotype_worker.models.pipeline.network_calls import NetworkCalls, alone
from calotype_worker.models.pipeline.roles import Place
from calotype_worker.models.pipeline.row_split import RowSplit

_LONGEST_WAIT = 16  # maximum number of other calls that a call waits for


@dataclass(frozen=True, kw_only=True)
class CallReport:
    """The result of one merged call. The runs in `ended` have left the batch."""

    place: Place
    rows: int
    calls: int
    ended: Sequence[PipelineRun]


class CallBatch:
    """Owned by the engine's thread.

    `order` ranks the networks' methods, lowest first: cheap ones run before the denoiser, so that requests that are
    behind catch up with those waiting there; calls after the last step run last.
    """

    def __init__(
        self,
        calls: NetworkCalls,
        *,
        order: Callable[[Place], float],
        max_rows: int,
        limit: Callable[[Place], MemoryLimit],
        split: RowSplit | None = None,
    ) -> None:
        self._calls = calls
        self._order = order
        self._max_rows = max_rows
        self._limit = limit  # how many rows of one place's calls fit into memory together
        self._split = split  # for calls that do not fit by themselves
        self.runs: list[PipelineRun] = []  # in the order in which they joined

    def join(self, run: PipelineRun) -> None:
        """Add a run and execute it up to its first network call. It may end before that."""
        run.begin()
        self.runs.append(run)

    def leave(self, run: PipelineRun) -> None:
        """End a run wherever it is suspended. The others are not affected."""
        self.runs.remove(run)
        run.cancel()

    def step(self) -> CallReport | None:
        """Execute one merged call, then each of its runs up to its next call. None: no run waits for a call."""
        ended = [run for run in self.runs if run.ended]
        waiting = [run for run in self.runs if run.call is not None]
        if not waiting:
            self._drop(ended)
            return CallReport(place=("", ""), rows=0, calls=0, ended=ended) if ended else None
        lead = self._lead(waiting)
        chosen = self._mergeable(lead, waiting)
        place = _place(lead)
        outcomes = self._run(place, chosen)
        rows = sum(map(_rows, chosen))
        for run in waiting:
            run.waited += 1
        for run, outcome in zip(chosen, outcomes, strict=True):
            if isinstance(outcome, Exception):
                run.fail(outcome)
            else:
                run.resume(outcome)
        ended = [run for run in self.runs if run.ended]
        self._drop(ended)
        return CallReport(place=place, rows=rows, calls=len(chosen), ended=ended)

    def _drop(self, ended: Sequence[PipelineRun]) -> None:
        gone = set(map(id, ended))
        self.runs = [run for run in self.runs if id(run) not in gone]

    def _lead(self, waiting: Sequence[PipelineRun]) -> PipelineRun:
        """The run whose call is next: one that has waited too long, else the one that ranks first."""
        oldest = max(waiting, key=lambda run: run.waited)
        if oldest.waited >= _LONGEST_WAIT:
            return oldest
        return min(waiting, key=lambda run: (self._order(_place(run)), -run.waited))

    def _mergeable(self, lead: PipelineRun, waiting: Sequence[PipelineRun]) -> list[PipelineRun]:
        """The runs whose calls are merged with the lead's, up to the rows of one pass."""
        described: dict[int, PipelineRun] = {}
        for run in waiting:
            if run.call is not None and run.call.place == _place(lead):
                run.described = run.described or self._calls.describe(run.call)
                if run.described is not None:
                    described[id(run.described)] = run
        if lead.described is None:
            return [lead]
        chosen: list[PipelineRun] = []
        rows = 0
        for call in self._calls.mergeable(
            lead.described, [run.described for run in described.values() if run.described]
        ):
            if chosen and rows + call.rows > self._max_rows:
                continue
            rows += call.rows
            chosen.append(described[id(call)])
        return chosen

    def _run(self, place: Place, runs: Sequence[PipelineRun]) -> list[Any]:
        """Each run's result, or the error that its call raises even when executed alone."""
        limit = self._limit(place)

        def work(part: Sequence[PipelineRun]) -> list[Any]:
            if len(part) == 1:
                return [self._single(part[0], limit)]
            return self._calls.run([run.described for run in part if run.described is not None])

        def within_memory(part: Sequence[PipelineRun]) -> list[Any]:
            return [result for results in limit.run(part, work, rows=_rows) for result in results]

        return run_isolating_failures(runs, within_memory)

    def _single(self, run: PipelineRun, limit: MemoryLimit) -> Any:
        """One call: whole or, if it does not fit into memory, in parts of its rows, where that changes nothing."""
        call, described = run.call, run.described
        assert call is not None
        if described is None or self._split is None or not self._split.can(described):
            return alone(call)
        split = self._split
        limit.allow(described.rows)

        def work(rows: Sequence[int]) -> Any:
            return alone(call) if len(rows) == described.rows else split.part(described, rows[0], len(rows))

        parts = limit.run(range(described.rows), work)
        return parts[0] if len(parts) == 1 else split.joined(described, parts)


def _rows(run: PipelineRun) -> int:
    return 1 if run.described is None else run.described.rows


def _place(run: PipelineRun) -> Place:
    assert run.call is not None
    return run.call.place
