"""Parts of a sampler's trajectory: image-to-image starts late, a base model stops early, a refiner takes over."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch

from calotype_shared.errors import InvalidRequest
from calotype_worker.sampling.probe import scaled_input, step_arguments
from calotype_worker.sampling.samplers import is_edm


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The steps to take with a scheduler. Its own `timesteps` stay complete, because some samplers look ahead."""

    scheduler: Any  # its timesteps are set
    timesteps: torch.Tensor  # (N,), those to step through

    @classmethod
    def whole(cls, scheduler: Any) -> Self:
        return cls(scheduler=scheduler, timesteps=scheduler.timesteps)

    def starting_late(self, strength: float, num_inference_steps: int) -> Self:
        """The trajectory without the steps before an init image's noise level, like diffusers' `get_timesteps`.

        `strength` is the share of steps that remain; there may be none.
        """
        if hasattr(self.scheduler, "scale_noise"):  # flow-matching pipelines round in the other direction
            begin = int(num_inference_steps - num_inference_steps * strength)
        else:
            begin = num_inference_steps - int(num_inference_steps * strength)
        return self._beginning_at(begin * self.scheduler.order)

    def stopping_early(self, share: float) -> Self:
        """The steps above the noise level at `share` of the training timesteps: SDXL's `denoising_end`."""
        kept = int((self.timesteps >= self._cutoff(share)).sum())
        return type(self)(scheduler=self.scheduler, timesteps=self.timesteps[:kept])

    def taking_over(self, share: float) -> Self:
        """The steps below that noise level: SDXL's `denoising_start`."""
        kept = int((self.timesteps < self._cutoff(share)).sum())
        if self.scheduler.order == 2 and kept % 2 == 0:
            kept += 1  # not between the two halves of a second-order step
        return self._beginning_at(len(self.timesteps) - kept)

    def _beginning_at(self, index: int) -> Self:
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(index)
        return type(self)(scheduler=self.scheduler, timesteps=self.timesteps[index:])

    def _cutoff(self, share: float) -> int:
        if is_edm(self.scheduler):
            raise InvalidRequest(
                f"{type(self.scheduler).__name__} has no training timesteps, at which a model hands over to another",
                field="refiner",
                value=share,
                remedy="leave the refiner out",
            )
        training: int = self.scheduler.config.num_train_timesteps
        return round(training - share * training)


def probe_noising(trajectory: Trajectory) -> torch.Tensor:
    """How a clean image is noised at each of a trajectory's N steps: (N + 1, 2) float32.

    Row i is (p, q) of `p · image + q · noise` at the noise level before step i; the last row is (1, 0). Some
    schedulers derive this from their own step counter, so a copy is stepped along.
    """
    scheduler = copy.deepcopy(trajectory.scheduler)
    shape = (1, 1, 1, 2)
    image = torch.tensor([1.0, 0.0]).reshape(shape)
    noise = torch.tensor([0.0, 1.0]).reshape(shape)
    sample = torch.zeros(shape)
    arguments = step_arguments(scheduler, torch.Generator())
    rows = []
    for timestep in trajectory.timesteps:
        at = timestep.reshape(1)
        if hasattr(scheduler, "scale_noise"):  # flow matching
            noised = scheduler.scale_noise(image, at, noise)
        else:
            noised = scheduler.add_noise(image, noise, at)
        rows.append(noised.flatten().float())
        scaled_input(scheduler, sample, timestep)
        sample = scheduler.step(sample, timestep, sample, **arguments)[0]
    rows.append(torch.tensor([1.0, 0.0]))
    return torch.stack(rows)
