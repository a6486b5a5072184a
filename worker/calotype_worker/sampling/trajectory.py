"""Parts of a sampler's trajectory: image-to-image starts late, a base model stops early, a refiner takes over."""

from __future__ import annotations

import copy
from typing import Any

import torch

from calotype_worker.sampling.probe import scaled_input, step_arguments


def start_late(scheduler: Any, strength: float, num_inference_steps: int) -> None:
    """Leave out the steps before an init image's noise level, as diffusers' image-to-image `get_timesteps` does.

    `strength` is the share of the steps that remain; it may leave none.
    """
    kept = min(int(num_inference_steps * strength), num_inference_steps)
    _begin_at(scheduler, (num_inference_steps - kept) * scheduler.order)


def stop_early(scheduler: Any, share: float) -> None:
    """Keep the steps above the noise level at `share` of the training timesteps: SDXL's `denoising_end`."""
    kept = int((scheduler.timesteps >= _cutoff(scheduler, share)).sum())
    scheduler.timesteps = scheduler.timesteps[:kept]


def take_over(scheduler: Any, share: float) -> None:
    """Keep the steps below that noise level: SDXL's `denoising_start`."""
    kept = int((scheduler.timesteps < _cutoff(scheduler, share)).sum())
    if scheduler.order == 2 and kept % 2 == 0:
        kept += 1  # not between the two halves of a second-order step
    _begin_at(scheduler, len(scheduler.timesteps) - kept)


def _begin_at(scheduler: Any, index: int) -> None:
    scheduler.timesteps = scheduler.timesteps[index:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)


def _cutoff(scheduler: Any, share: float) -> int:
    training: int = scheduler.config.num_train_timesteps
    return round(training - share * training)


def probe_noising(scheduler: Any) -> torch.Tensor:
    """How the scheduler noises a clean picture at each of its N steps: (N + 1, 2) float32.

    Row i is (p, q) of `p · picture + q · noise` at the noise level before step i; the last row is (1, 0). Some
    schedulers look this up by how far they have stepped, so a copy is stepped along.
    """
    scheduler = copy.deepcopy(scheduler)
    shape = (1, 1, 1, 2)
    picture = torch.tensor([1.0, 0.0]).reshape(shape)
    noise = torch.tensor([0.0, 1.0]).reshape(shape)
    sample = torch.zeros(shape)
    arguments = step_arguments(scheduler, torch.Generator())
    rows = []
    for timestep in scheduler.timesteps:
        at = timestep.reshape(1)
        if hasattr(scheduler, "scale_noise"):  # flow matching
            noised = scheduler.scale_noise(picture, at, noise)
        else:
            noised = scheduler.add_noise(picture, noise, at)
        rows.append(noised.flatten().float())
        scaled_input(scheduler, sample, timestep)
        sample = scheduler.step(sample, timestep, sample, **arguments)[0]
    rows.append(torch.tensor([1.0, 0.0]))
    return torch.stack(rows)
