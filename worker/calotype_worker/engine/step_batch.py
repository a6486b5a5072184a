"""`StepBatch`: the tensors of one running group, and one denoising step over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from calotype_worker.engine.compiled import REMEMBERED, CompiledStep, product
from calotype_worker.engine.memory_limit import MemoryLimit, is_out_of_memory, let_go
from calotype_worker.engine.slot import Layout, Slot, layout
from calotype_worker.engine.split import is_fatal, run_splitting
from calotype_worker.models.base import Rows, StepModel
from calotype_worker.sampling.row_scheduler import RowScheduler
from calotype_worker.sampling.table import SamplerTable


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did. `failed` pairs slots with what they raised; they have left the batch."""

    finished: Sequence[tuple[Slot, torch.Tensor]]  # with their latents, (C, h, w) float32
    failed: Sequence[tuple[Slot, Exception]]
    previews: Sequence[tuple[Slot, np.ndarray]]  # uint8 (h, w, 3); the slot's step is the preview's
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
        self._buckets = sorted(buckets)  # a forward pass is padded to the next of these; none: no padding
        self._exact = exact  # the same bits in any company
        self._compiled = compiled
        self.slots: list[Slot] = []
        # S = [x, s_1 … s_K] of each slot, flattened: (slots, K+1, C*h*w) float32.
        self._state = torch.zeros(0, 1, shape[0] * shape[1] * shape[2], device=model.device)
        self._layout: Layout | None = None  # rebuilt when membership changes
        # All slots' tables laid end to end, and where each slot stands in them.
        self._matrices = self._input_scale = self._timesteps = self._position = torch.empty(0)

    def join(self, slots: Sequence[Slot]) -> None:
        """Take slots in at their first step. Their latents and conditioning must be set."""
        starts = [slot.latents for slot in slots if slot.latents is not None]
        # Those that another model hands over are on the device already, fresh ones are not.
        fresh = torch.cat([latents.reshape(1, 1, -1).to(self._model.device) for latents in starts])
        self.slots += slots
        self._lay_out(torch.cat([self._state, _widen(fresh, self._state.shape[1])]))

    def leave(self, slots: Sequence[Slot]) -> None:
        """Drop slots, finished or not. The others' states are untouched."""
        gone = {id(slot) for slot in slots}
        for slot in slots:
            slot.forget()
        kept = [index for index, slot in enumerate(self.slots) if id(slot) not in gone]
        self.slots = [self.slots[index] for index in kept]
        self._lay_out(self._state[torch.tensor(kept, dtype=torch.long, device=self._state.device)])

    def step(self) -> StepReport:
        """One denoising step of every slot; finished and failed ones leave."""
        failed: list[tuple[Slot, Exception]] = []
        self._layout = self._layout or self._lay_out_rows(self.slots)
        useful = len(self.slots) + len(self._layout.guided)
        padding = len(self._layout.owners) - useful
        noise = self._noise()
        graph = self._run_compiled(self._layout, noise)
        if graph is None:
            inputs, timesteps = self._inputs()
            try:
                outputs = self._forward(self._layout, self.slots, inputs, timesteps)
            except Exception as error:
                if is_fatal(error):
                    raise
                outputs, failed = self._forward_apart(inputs, timesteps)
            stacked = torch.cat([self._state, outputs.flatten(1).unsqueeze(1), noise], dim=1)
            new_state = product(self._matrices[self._position], stacked)
        else:
            new_state, outputs, inputs = graph
            timesteps = self._timesteps[self._position]
        bad = {id(slot) for slot, _ in failed}
        previews = self._previews(inputs, outputs, timesteps, bad)
        fallback_steps = self._advance(outputs, new_state)
        done = [
            (slot, self._state[index, 0].reshape(self._shape).clone())
            for index, slot in enumerate(self.slots)
            if slot.step == slot.total_steps and id(slot) not in bad
        ]
        if done or failed:
            self.leave([slot for slot, _ in (*done, *failed)])
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
        """The whole step as one graph; None where these rows cannot go that way, or would not fit into memory."""
        if self._compiled is None or not self._compiled.can(rows, self._shape):
            return None
        if len(rows.owners) > self._limit.current:
            return None
        if any(isinstance(slot.sampler, RowScheduler) for slot in self.slots):
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
            let_go(error)
            return None  # the eager way finds out what fits

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled network inputs (slots, C, h, w) and each slot's own timestep (slots,)."""
        sample = self._state[:, 0].reshape(-1, *self._shape)
        inputs = sample * self._input_scale[self._position].reshape(-1, 1, 1, 1)
        timesteps = self._timesteps[self._position]
        for index, slot in enumerate(self.slots):
            if isinstance(slot.sampler, RowScheduler):
                inputs[index] = slot.sampler.model_input(sample[index : index + 1])[0]
                timesteps[index] = slot.sampler.timestep
        return inputs, timesteps

    def _forward(
        self, rows: Layout, slots: Sequence[Slot], inputs: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Guided model output of the slots, (slots, C, h, w) float32.

        Classifier-free guidance (Ho & Salimans 2022): m = m_u + g * (m_c - m_u), on guided rows only.
        """
        count, guided_count = len(slots), len(rows.guided)
        wanted = Rows(
            latents=inputs[rows.source],
            timesteps=timesteps[rows.source],
            conditioning=rows.conditioning,
            lengths=rows.lengths,
            loras=rows.loras,
            controls=rows.controls(slots),
            exact=self._exact,
            memories=rows.memories(slots),
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
        """The network on all rows at once, or, where they do not fit into memory, in parts of as many as do. Parts that
        are padding alone are left out."""
        count, most = len(rows.latents), self._limit.current
        needed = min(count, -(-useful // most) * most)

        def run(part: Sequence[int]) -> torch.Tensor:
            return self._model.predict(rows if len(part) == count else rows.part(slice(part[0], part[-1] + 1)))

        outputs = self._limit.run(range(needed), run)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _forward_apart(
        self, inputs: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[Slot, Exception]]]:
        """After a forward pass raised: smaller passes, to find who is to blame. The blameless get their outputs."""

        def run(indices: Sequence[int]) -> list[torch.Tensor]:
            chosen = torch.tensor(indices, device=inputs.device)
            slots = [self.slots[index] for index in indices]
            return list(self._forward(self._lay_out_rows(slots), slots, inputs[chosen], timesteps[chosen]))

        outputs = torch.zeros_like(inputs)
        failed = []
        for index, result in enumerate(run_splitting(range(len(self.slots)), run)):
            if isinstance(result, Exception):
                failed.append((self.slots[index], result))
            else:
                outputs[index] = result
        return outputs, failed

    def _previews(
        self, inputs: torch.Tensor, outputs: torch.Tensor, timesteps: torch.Tensor, bad: set[int]
    ) -> list[tuple[Slot, np.ndarray]]:
        """Rough pictures of where slots are heading, for those that want one after this step."""
        due = [
            index
            for index, slot in enumerate(self.slots)
            if slot.request.preview_every
            and (slot.step + 1) % slot.request.preview_every == 0
            and slot.step + 1 < slot.total_steps
            and id(slot) not in bad
        ]
        if not due:
            return []
        chosen = torch.tensor(due, device=inputs.device)
        clean = self._model.predicted_original(inputs[chosen], outputs[chosen], timesteps[chosen])
        return [(self.slots[index], self._model.preview(own)) for index, own in zip(due, clean, strict=True)]

    def _noise(self) -> torch.Tensor:
        """Each slot's fresh noise, zero where its sampler wants none in this step: (slots, 1, L)."""
        device = self._state.device
        noise = torch.zeros(len(self.slots), 1, self._state.shape[2], pin_memory=device.type == "cuda")
        for index, slot in enumerate(self.slots):
            if isinstance(slot.sampler, SamplerTable) and slot.sampler.draws_noise[slot.step]:
                noise[index, 0] = slot.noise(self._shape).flatten()
        return noise.to(device, non_blocking=True)

    def _advance(self, outputs: torch.Tensor, new_state: torch.Tensor) -> int:
        """To S' = M_i · [S; m; n] of every slot at its own i. Returns how many slots went the slow way instead."""
        fallback_steps = 0
        for index, slot in enumerate(self.slots):
            if isinstance(slot.sampler, RowScheduler):
                sample = self._state[index, 0].reshape(1, *self._shape)
                new_state[index, 0] = slot.sampler.advance(sample, outputs[index : index + 1]).flatten()
                fallback_steps += 1
            slot.step += 1
            if slot.kept is not None:
                new_state[index, 0] = slot.kept.blend(new_state[index, 0].reshape(self._shape), slot.step).flatten()
        self._state = new_state
        self._position = self._position + 1
        return fallback_steps

    def _lay_out_rows(self, slots: Sequence[Slot]) -> Layout:
        return layout(slots, buckets=self._buckets, device=self._model.device)

    def _lay_out(self, state: torch.Tensor) -> None:
        """Fit state and tables to the present slots. K is the largest any of them needs."""
        self._layout = None
        remembered = max((s.sampler.remembered for s in self.slots if isinstance(s.sampler, SamplerTable)), default=0)
        if self._compiled is not None and self.slots:
            remembered = max(remembered, REMEMBERED)
        self._state = _widen(state, remembered + 1) if remembered + 1 >= state.shape[1] else state[:, : remembered + 1]
        matrices, scales, timesteps, positions = [], [], [], []
        offset = 0
        for slot in self.slots:
            table = slot.sampler if isinstance(slot.sampler, SamplerTable) else _standstill(slot.total_steps)
            matrices.append(table.widened(remembered))
            scales.append(table.input_scale)
            timesteps.append(table.timesteps)
            # A slot that just finished points one past its own table; it leaves before the next look-up.
            positions.append(offset + slot.step)
            offset += len(table)
        if not self.slots:
            return
        device = self._model.device
        self._matrices = torch.cat(matrices).to(device)
        self._input_scale = torch.cat(scales).to(device)
        self._timesteps = torch.cat(timesteps).to(device)
        self._position = torch.tensor(positions, device=device)


def _widen(state: torch.Tensor, height: int) -> torch.Tensor:
    """Room for more remembered tensors, zeroed: 0 · NaN would poison the product."""
    missing = height - state.shape[1]
    return torch.nn.functional.pad(state, (0, 0, 0, missing)) if missing > 0 else state


def _standstill(steps: int) -> SamplerTable:
    """A table that changes nothing, for slots whose scheduler object does the stepping."""
    keep = torch.zeros(steps, 1, 3)
    keep[:, 0, 0] = 1
    return SamplerTable(
        matrices=keep,
        input_scale=torch.ones(steps),
        timesteps=torch.zeros(steps),
        draws_noise=(False,) * steps,
        initial_sigma=1.0,
    )
