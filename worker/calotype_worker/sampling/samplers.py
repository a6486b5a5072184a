"""The samplers: the diffusers scheduler and settings of each `SamplerType`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import SamplerType


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A diffusers scheduler class, and its changes to the model's own scheduler config."""

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


# Flow matching (Stable Diffusion 3, Flux) has its own noise levels; the same names mean the same solvers on them.
FLOW_SAMPLERS: dict[SamplerType, Sampler] = {
    SamplerType.EULER: Sampler(scheduler=diffusers.FlowMatchEulerDiscreteScheduler),
    SamplerType.HEUN: Sampler(scheduler=diffusers.FlowMatchHeunDiscreteScheduler),
}


def sampler_of(scheduler: Any, samplers: Mapping[SamplerType, Sampler]) -> SamplerType | None:
    """The first sampler with this scheduler's class, which is the one that a model's authors intended."""
    return next((kind for kind, spec in samplers.items() if type(scheduler) is spec.scheduler), None)


def make_scheduler(
    sampler: SamplerType,
    base_config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    samplers: Mapping[SamplerType, Sampler] = SAMPLERS,
    **timesteps: Any,
) -> Any:
    """A new diffusers scheduler with its timesteps set.

    `base_config` is the config of the model's own scheduler, taken after its pipeline was constructed (the
    constructor rewrites it); beta schedule, prediction type and spacing carry over from it. `timesteps` are further
    arguments of `set_timesteps`.

    Raises:
        InvalidRequest: this family does not support the sampler, or the scheduler that number of steps.
    """
    if sampler not in samplers:
        raise InvalidRequest(
            "is not available for this model",
            field="sampler",
            value=sampler.value,
            remedy=f"use one of: {', '.join(known.value for known in samplers)}",
        )
    spec = samplers[sampler]
    scheduler = spec.scheduler.from_config(dict(base_config), **spec.overrides)
    try:
        scheduler.set_timesteps(num_inference_steps, **timesteps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InvalidRequest(
            f"sampler {sampler.value!r} does not support this ({error})",
            field="num_inference_steps",
            value=num_inference_steps,
            remedy="use a number of steps that this sampler supports, or another sampler",
        ) from error
    return scheduler
