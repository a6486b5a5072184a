"""`RowScheduler`: the slow way for samplers that have no table. One diffusers scheduler object for one row."""

from __future__ import annotations

import torch

from calotype_worker.sampling.probe import scaled_input, step_arguments
from calotype_worker.sampling.trajectory import Trajectory


class RowScheduler:
    """Steps one row through a scheduler it owns. Used by the engine's thread alone."""

    def __init__(self, trajectory: Trajectory, generator: torch.Generator) -> None:
        self._scheduler = trajectory.scheduler
        self._timesteps = trajectory.timesteps
        self._arguments = step_arguments(trajectory.scheduler, generator)
        self._index = 0

    @property
    def timestep(self) -> torch.Tensor:
        return self._timesteps[self._index]

    def model_input(self, sample: torch.Tensor) -> torch.Tensor:
        """The scaled network input for the current step. `sample`: (1, C, h, w)."""
        return scaled_input(self._scheduler, sample, self.timestep)

    def advance(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The sample after the current step. Both arguments (1, C, h, w), float32."""
        new_sample = self._scheduler.step(output, self.timestep, sample, **self._arguments)[0]
        self._index += 1
        return new_sample
