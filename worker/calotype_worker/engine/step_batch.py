"""`StepBatch`: the tensors of one running group, and one denoising step over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from calotype_worker.engine.batch_row import BatchRow, Layout, layout
from calotype_worker.engine.compiled import REMEMBERED, CompiledStep
from calotype_worker.engine.failure_isolation import is_fatal, run_isolating_failures
from calotype_worker.engine.memory_limit import MemoryLimit, free_failed_pass, is_out_of_memory
from calotype_worker.models.base import Rows, StepModel
from calotype_worker.sampling.row_scheduler import RowScheduler
from calotype_worker.sampling.table import SamplerTable, product


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The result of one step. `failed` pairs members with their errors; they have left the batch."""

    finished: Sequence[tuple[BatchRow, torch.Tensor]]  # with their latents, (C, h, w) float32
    failed: Sequence[tuple[BatchRow, Exception]]
    previews: Sequence[tuple[BatchRow, np.ndarray]]  # uint8 (h, w, 3); the row's step is the preview's
    rows: int
    padding_rows: int
    fallback_steps: int
    compiled: bool


class StepBatch:
    """Owned by the engine's thread."""

    def __init__(
        self,
        model: StepModel,
        *,
        shape: tuple[int, int, int],
        limit: MemoryLimit,
        buckets: Sequence[int] = (),
        exact: bool = False,
        compiled: CompiledStep | None = None,
    ) -> None:
        self._model = model
        self._shape = shape  # (C, h, w)
        self._limit = limit  # rows of a forward pass that fit into memory
        self._buckets = sorted(buckets)  # a forward pass is padded to the next of these; empty: no padding
        self._exact = exact  # the same bits whatever rows run beside
        self._compiled = compiled
        self.members: list[BatchRow] = []
        # S = [x, s_1 … s_K] of each row, flattened: (members, K+1, C*h*w) float32.
        self._state = torch.zeros(0, 1, shape[0] * shape[1] * shape[2], device=model.device)
        self._layout: Layout | None = None  # rebuilt when membership changes
        # All members' tables, concatenated, and each row's position in them.
        self._matrices = self._input_scale = self._timesteps = self._position = torch.empty(0)

    def join(self, members: Sequence[BatchRow]) -> None:
        """Take members in at their first step. Their latents and conditioning must be set."""
        starts = [row.latents for row in members if row.latents is not None]
        # Latents from another model are already on the device; new ones are not.
        fresh = torch.cat([latents.reshape(1, 1, -1).to(self._model.device) for latents in starts])
        self.members += members
        self._lay_out(torch.cat([self._state, _widen(fresh, self._state.shape[1])]))

    def leave(self, members: Sequence[BatchRow]) -> None:
        """Remove members, finished or not. The states of the others do not change."""
        gone = {id(row) for row in members}
        for row in members:
            row.forget()
        kept = [index for index, row in enumerate(self.members) if id(row) not in gone]
        self.members = [self.members[index] for index in kept]
        self._lay_out(self._state[torch.tensor(kept, dtype=torch.long, device=self._state.device)])

    def step(self) -> StepReport:
        """Execute one denoising step of every row. Finished and failed members leave."""
        failed: list[tuple[BatchRow, Exception]] = []
        self._layout = self._layout or self._lay_out_rows(self.members)
        useful = len(self.members) + len(self._layout.guided)
        padding = len(self._layout.owners) - useful
        noise = self._noise()
        graph = self._run_compiled(self._layout, noise)
        if graph is None:
            inputs, timesteps = self._inputs()
            try:
                outputs = self._forward(self._layout, self.members, inputs, timesteps)
            except Exception as error:
                if is_fatal(error):
                    raise
                outputs, failed = self._forward_apart(inputs, timesteps)
            stacked = torch.cat([self._state, outputs.flatten(1).unsqueeze(1), noise], dim=1)
            new_state = product(self._matrices[self._position], stacked)
        else:
            new_state, outputs, inputs = graph
            timesteps = self._timesteps[self._position]
        bad = {id(row) for row, _ in failed}
        previews, unpreviewed = self._previews(inputs, outputs, timesteps, bad)
        failed += unpreviewed
        bad |= {id(row) for row, _ in unpreviewed}
        fallback_steps = self._advance(outputs, new_state)
        done = [
            (row, self._state[index, 0].reshape(self._shape).clone())
            for index, row in enumerate(self.members)
            if row.step == row.total_steps and id(row) not in bad
        ]
        if done or failed:
            self.leave([row for row, _ in (*done, *failed)])
        return StepReport(
            finished=done,
            failed=failed,
            previews=previews,
            rows=useful,
            padding_rows=padding,
            fallback_steps=fallback_steps,
            compiled=graph is not None,
        )

    def _run_compiled(
        self, rows: Layout, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Execute the whole step as one graph. None if these rows cannot, or do not fit into memory."""
        if self._compiled is None or not self._compiled.can(rows, self._shape):
            return None
        if len(rows.owners) > self._limit.current:
            return None
        if any(isinstance(row.sampler, RowScheduler) for row in self.members):
            return None
        try:
            return self._compiled(
                rows,
                self._shape,
                state=self._state,
                matrices=self._matrices[self._position],
                input_scale=self._input_scale[self._position],
                timesteps=self._timesteps[self._position],
                noise=noise,
            )
        except Exception as error:
            if is_fatal(error) or not is_out_of_memory(error):
                raise
            free_failed_pass(error)
            return None  # eager execution finds out what fits

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled network inputs (members, C, h, w) and each row's own timestep (members,)."""
        sample = self._state[:, 0].reshape(-1, *self._shape)
        inputs = sample * self._input_scale[self._position].reshape(-1, 1, 1, 1)
        timesteps = self._timesteps[self._position]
        for index, row in enumerate(self.members):
            if isinstance(row.sampler, RowScheduler):
                inputs[index] = row.sampler.model_input(sample[index : index + 1])[0]
                timesteps[index] = row.sampler.timestep
        return inputs, timesteps

    def _forward(
        self, rows: Layout, members: Sequence[BatchRow], inputs: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The members' guided model output, (members, C, h, w) float32.

        Classifier-free guidance (Ho & Salimans 2022): m = m_u + g * (m_c - m_u), on guided rows only.
        """
        count, guided_count = len(members), len(rows.guided)
        wanted = Rows(
            latents=inputs[rows.source],
            timesteps=timesteps[rows.source],
            conditioning=rows.conditioning,
            lengths=rows.lengths,
            loras=rows.loras,
            controls=rows.controls(members),
            exact=self._exact,
            memories=rows.memories(members),
        )
        outputs = self._predict(wanted, useful=count + guided_count)
        if not guided_count:
            return outputs[:count]
        result = outputs[:count].clone()
        unconditional = outputs[count : count + guided_count]
        conditional = result[rows.guided]
        result[rows.guided] = unconditional + rows.guidance * (conditional - unconditional)
        return result

    def _predict(self, rows: Rows, *, useful: int) -> torch.Tensor:
        """Call the network on all rows at once or, if they do not fit into memory, in parts that do.

        Parts that consist only of padding are skipped.
        """
        count, most = len(rows.latents), self._limit.current
        needed = min(count, -(-useful // most) * most)

        def run(part: Sequence[int]) -> torch.Tensor:
            return self._model.predict(rows if len(part) == count else rows.part(slice(part[0], part[-1] + 1)))

        outputs = self._limit.run(range(needed), run)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _forward_apart(
        self, inputs: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[BatchRow, Exception]]]:
        """Repeat a failed forward pass in smaller parts to find the members that fail. The others get their outputs."""

        def run(indices: Sequence[int]) -> list[torch.Tensor]:
            chosen = torch.tensor(indices, device=inputs.device)
            members = [self.members[index] for index in indices]
            return list(self._forward(self._lay_out_rows(members), members, inputs[chosen], timesteps[chosen]))

        outputs = torch.zeros_like(inputs)
        failed = []
        for index, result in enumerate(run_isolating_failures(range(len(self.members)), run)):
            if isinstance(result, Exception):
                failed.append((self.members[index], result))
            else:
                outputs[index] = result
        return outputs, failed

    def _previews(
        self, inputs: torch.Tensor, outputs: torch.Tensor, timesteps: torch.Tensor, bad: set[int]
    ) -> tuple[list[tuple[BatchRow, np.ndarray]], list[tuple[BatchRow, Exception]]]:
        """Preview images for the members that want one after this step, and the members whose preview failed."""
        due = [
            index
            for index, row in enumerate(self.members)
            if row.request.preview_every
            and (row.step + 1) % row.request.preview_every == 0
            and row.step + 1 < row.total_steps
            and id(row) not in bad
        ]
        if not due:
            return [], []

        def run(indices: Sequence[int]) -> list[np.ndarray]:
            chosen = torch.tensor(indices, device=inputs.device)
            clean = self._model.predicted_original(inputs[chosen], outputs[chosen], timesteps[chosen])
            return [self._model.preview(own) for own in clean]

        made: list[tuple[BatchRow, np.ndarray]] = []
        failed: list[tuple[BatchRow, Exception]] = []
        for index, result in zip(due, run_isolating_failures(due, run), strict=True):
            if isinstance(result, Exception):
                failed.append((self.members[index], result))
            else:
                made.append((self.members[index], result))
        return made, failed

    def _noise(self) -> torch.Tensor:
        """Each member's new noise, zero if its sampler uses none in this step: (members, 1, L)."""
        device = self._state.device
        noise = torch.zeros(len(self.members), 1, self._state.shape[2], pin_memory=device.type == "cuda")
        for index, row in enumerate(self.members):
            if isinstance(row.sampler, SamplerTable) and row.sampler.draws_noise[row.step]:
                noise[index, 0] = row.noise(self._shape).flatten()
        return noise.to(device, non_blocking=True)

    def _advance(self, outputs: torch.Tensor, new_state: torch.Tensor) -> int:
        """Set S' = M_i · [S; m; n] for every member at its own i. Returns how many used a scheduler object instead."""
        fallback_steps = 0
        for index, row in enumerate(self.members):
            if isinstance(row.sampler, RowScheduler):
                sample = self._state[index, 0].reshape(1, *self._shape)
                new_state[index, 0] = row.sampler.advance(sample, outputs[index : index + 1]).flatten()
                fallback_steps += 1
            row.step += 1
            if row.kept is not None:
                new_state[index, 0] = row.kept.blend(new_state[index, 0].reshape(self._shape), row.step).flatten()
        self._state = new_state
        self._position = self._position + 1
        return fallback_steps

    def _lay_out_rows(self, members: Sequence[BatchRow]) -> Layout:
        return layout(members, buckets=self._buckets, device=self._model.device)

    def _lay_out(self, state: torch.Tensor) -> None:
        """Fit state and tables to the present members. K is the largest any of them needs."""
        self._layout = None
        remembered = max((s.sampler.remembered for s in self.members if isinstance(s.sampler, SamplerTable)), default=0)
        if self._compiled is not None and self.members:
            remembered = max(remembered, REMEMBERED)
        self._state = _widen(state, remembered + 1) if remembered + 1 >= state.shape[1] else state[:, : remembered + 1]
        matrices, scales, timesteps, positions = [], [], [], []
        offset = 0
        for row in self.members:
            table = row.sampler if isinstance(row.sampler, SamplerTable) else _standstill(row.total_steps)
            matrices.append(table.widened(remembered))
            scales.append(table.input_scale)
            timesteps.append(table.timesteps)
            # A member that just finished points one past its own table; it leaves before the next look-up.
            positions.append(offset + row.step)
            offset += len(table)
        if not self.members:
            return
        device = self._model.device
        self._matrices = torch.cat(matrices).to(device)
        self._input_scale = torch.cat(scales).to(device)
        self._timesteps = torch.cat(timesteps).to(device)
        self._position = torch.tensor(positions, device=device)


def _widen(state: torch.Tensor, height: int) -> torch.Tensor:
    """Add space for more remembered tensors, zeroed because 0 · NaN would be NaN."""
    missing = height - state.shape[1]
    return torch.nn.functional.pad(state, (0, 0, 0, missing)) if missing > 0 else state


def _standstill(steps: int) -> SamplerTable:
    """An identity table, for members that are stepped by a scheduler object."""
    keep = torch.zeros(steps, 1, 3)
    keep[:, 0, 0] = 1
    return SamplerTable(
        matrices=keep,
        input_scale=torch.ones(steps),
        timesteps=torch.zeros(steps),
        draws_noise=(False,) * steps,
        initial_sigma=1.0,
    )
