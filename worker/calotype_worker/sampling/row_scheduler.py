"""`RowScheduler`: the slow way for samplers that have no table. One diffusers scheduler object for one row."""

from __future__ import annotations

from typing import Any

import torch

from calotype_worker.sampling.probe import scaled_input, step_arguments


class RowScheduler:
    """Steps one row through a scheduler it owns. Used by the engine's thread alone."""

    def __init__(self, scheduler: Any, generator: torch.Generator) -> None:
        self._scheduler = scheduler
        self._arguments = step_arguments(scheduler, generator)
        self._index = 0

    @property
    def timestep(self) -> torch.Tensor:
        return self._scheduler.timesteps[self._index]

    def model_input(self, sample: torch.Tensor) -> torch.Tensor:
        """The scaled network input for the current step. `sample`: (1, C, h, w)."""
        return scaled_input(self._scheduler, sample, self.timestep)

    def advance(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The sample after the current step. Both arguments (1, C, h, w), float32."""
        new_sample = self._scheduler.step(output, self.timestep, sample, **self._arguments)[0]
        self._index += 1
        return new_sample
