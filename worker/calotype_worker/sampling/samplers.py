"""The visible dict of samplers: which diffusers scheduler each `SamplerType` is, and with what settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers

from calotype_shared.config import SamplerType
from calotype_shared.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A diffusers scheduler class and what it sets over the model's own scheduler config."""

    scheduler: type[Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)


# Latents are not bounded like pixels, so no sampler clips them; a bare DDPM or DDIM would (clip_sample=True is
# their default), which StableDiffusionPipeline's constructor corrects only for the scheduler it is given.
_UNCLIPPED = {"clip_sample": False}

SAMPLERS: dict[SamplerType, Sampler] = {
    SamplerType.DDPM: Sampler(scheduler=diffusers.DDPMScheduler, overrides=_UNCLIPPED),
    SamplerType.DDIM: Sampler(scheduler=diffusers.DDIMScheduler, overrides=_UNCLIPPED),
    SamplerType.PNDM: Sampler(scheduler=diffusers.PNDMScheduler, overrides={"skip_prk_steps": True}),
    SamplerType.EULER: Sampler(scheduler=diffusers.EulerDiscreteScheduler),
    SamplerType.EULER_A: Sampler(scheduler=diffusers.EulerAncestralDiscreteScheduler),
    SamplerType.HEUN: Sampler(scheduler=diffusers.HeunDiscreteScheduler, overrides=_UNCLIPPED),
    SamplerType.DPMPP_2M: Sampler(
        scheduler=diffusers.DPMSolverMultistepScheduler,
        overrides={"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    ),
    SamplerType.DPMPP_2M_KARRAS: Sampler(
        scheduler=diffusers.DPMSolverMultistepScheduler,
        overrides={"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    SamplerType.UNIPC: Sampler(scheduler=diffusers.UniPCMultistepScheduler, overrides={"solver_order": 2}),
    SamplerType.LCM: Sampler(scheduler=diffusers.LCMScheduler, overrides=_UNCLIPPED),
}


def make_scheduler(sampler: SamplerType, base_config: Mapping[str, Any], num_inference_steps: int) -> Any:
    """A fresh diffusers scheduler with its timesteps set.

    `base_config` is the config of the model's own scheduler, taken after its pipeline was constructed (the
    constructor rewrites it); beta schedule, prediction type and spacing carry over from it.

    Raises:
        InvalidRequest: the scheduler cannot do that many steps.
    """
    spec = SAMPLERS[sampler]
    scheduler = spec.scheduler.from_config(dict(base_config), **spec.overrides)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InvalidRequest(
            f"sampler {sampler.value!r} cannot do that ({error})",
            field="num_inference_steps",
            value=num_inference_steps,
            remedy="use a number of steps that this sampler supports, or another sampler",
        ) from error
    return scheduler
