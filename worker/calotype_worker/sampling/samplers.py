"""The samplers: the diffusers scheduler and settings of each `SamplerType`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import SamplerType
from calotype_worker.sampling.probe import scaled_input, step_arguments

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A diffusers scheduler class, and its changes to the model's own scheduler config."""

    scheduler: type[Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)


# Latents are not bounded like pixels, so no sampler clips them; a bare DDPM or DDIM would (clip_sample=True is
# their default), which StableDiffusionPipeline's constructor corrects only for the scheduler it is given.
_UNCLIPPED = {"clip_sample": False}


def _dpm_solver(algorithm: str, *, order: int, karras: bool = False) -> Sampler:
    return Sampler(
        scheduler=diffusers.DPMSolverMultistepScheduler,
        overrides={"algorithm_type": algorithm, "solver_order": order, "use_karras_sigmas": karras},
    )


SAMPLERS: dict[SamplerType, Sampler] = {
    SamplerType.DDPM: Sampler(scheduler=diffusers.DDPMScheduler, overrides=_UNCLIPPED),
    SamplerType.DDIM: Sampler(scheduler=diffusers.DDIMScheduler, overrides=_UNCLIPPED),
    SamplerType.PNDM: Sampler(scheduler=diffusers.PNDMScheduler, overrides={"skip_prk_steps": True}),
    SamplerType.EULER: Sampler(scheduler=diffusers.EulerDiscreteScheduler, overrides={"use_karras_sigmas": False}),
    SamplerType.EULER_A: Sampler(scheduler=diffusers.EulerAncestralDiscreteScheduler),
    SamplerType.HEUN: Sampler(scheduler=diffusers.HeunDiscreteScheduler, overrides=_UNCLIPPED),
    SamplerType.DPMPP_2M: _dpm_solver("dpmsolver++", order=2),
    SamplerType.DPMPP_2M_KARRAS: _dpm_solver("dpmsolver++", order=2, karras=True),
    SamplerType.UNIPC: Sampler(scheduler=diffusers.UniPCMultistepScheduler, overrides={"solver_order": 2}),
    SamplerType.LCM: Sampler(scheduler=diffusers.LCMScheduler, overrides=_UNCLIPPED),
    SamplerType.EULER_KARRAS: Sampler(
        scheduler=diffusers.EulerDiscreteScheduler, overrides={"use_karras_sigmas": True}
    ),
    SamplerType.DPMPP_2M_SDE: _dpm_solver("sde-dpmsolver++", order=2),
    SamplerType.DPMPP_2M_SDE_KARRAS: _dpm_solver("sde-dpmsolver++", order=2, karras=True),
    SamplerType.DPMPP_3M: _dpm_solver("dpmsolver++", order=3),
    SamplerType.DPMPP_3M_SDE: _dpm_solver("sde-dpmsolver++", order=3),
    SamplerType.DPMPP_2S: Sampler(
        scheduler=diffusers.DPMSolverSinglestepScheduler,
        # Without a last step of lower order it cannot end at a noise level of zero; it says so with each set of steps.
        overrides={"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
    ),
    SamplerType.DPM2: Sampler(scheduler=diffusers.KDPM2DiscreteScheduler),
    SamplerType.DPM2_A: Sampler(scheduler=diffusers.KDPM2AncestralDiscreteScheduler),
    SamplerType.DEIS: Sampler(scheduler=diffusers.DEISMultistepScheduler, overrides={"solver_order": 2}),
    SamplerType.SA_SOLVER: Sampler(scheduler=diffusers.SASolverScheduler),
    SamplerType.UNIPC_3: Sampler(scheduler=diffusers.UniPCMultistepScheduler, overrides={"solver_order": 3}),
    SamplerType.TCD: Sampler(scheduler=diffusers.TCDScheduler, overrides=_UNCLIPPED),
}


# Flow matching (Stable Diffusion 3, Flux) has its own noise levels; the same names mean the same solvers on them.
FLOW_SAMPLERS: dict[SamplerType, Sampler] = {
    SamplerType.EULER: Sampler(scheduler=diffusers.FlowMatchEulerDiscreteScheduler),
    SamplerType.HEUN: Sampler(scheduler=diffusers.FlowMatchHeunDiscreteScheduler),
}

# So has the EDM formulation (Karras et al. 2022; CosXL): levels between sigma_min and sigma_max, and no betas.
EDM_SAMPLERS: dict[SamplerType, Sampler] = {
    SamplerType.EULER: Sampler(scheduler=diffusers.EDMEulerScheduler),
    SamplerType.DPMPP_2M: Sampler(
        scheduler=diffusers.EDMDPMSolverMultistepScheduler,
        overrides={"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
}

# What decides a scheduler's noise levels, besides its betas. A scheduler that lacks one would silently have others.
_NOISE_LEVELS = ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas")
_PROBE_STEPS = 6


def sampler_of(scheduler: Any, samplers: Mapping[SamplerType, Sampler]) -> SamplerType | None:
    """The first sampler with this scheduler's class, which is the one that a model's authors intended."""
    return next((kind for kind, spec in samplers.items() if type(scheduler) is spec.scheduler), None)


def is_edm(scheduler: Any) -> bool:
    """Whether its timesteps are logarithms of noise levels, not indices of training steps."""
    return type(scheduler) in {spec.scheduler for spec in EDM_SAMPLERS.values()}


def samplers_following(scheduler: Any) -> dict[SamplerType, Sampler]:
    """The samplers with the noise levels of a U-Net's own scheduler; its own first. Empty: none is known.

    The own one is called `model` if none of the others has its class and settings.
    """
    config = dict(scheduler.config)
    if is_edm(scheduler):
        family = EDM_SAMPLERS
    elif "beta_start" in config:
        family = SAMPLERS
    else:
        return {}
    own = next((kind for kind, spec in family.items() if _is(scheduler, spec)), SamplerType.MODEL)
    found = {own: family.get(own, Sampler(scheduler=type(scheduler)))}
    if config.get("prediction_type") != "flow_prediction" and not config.get("use_flow_sigmas"):
        found |= {kind: spec for kind, spec in family.items() if kind is not own and _follows(spec, config)}
    return found if _runs(found[own], config) else {}


def _is(scheduler: Any, spec: Sampler) -> bool:
    """Whether it is this sampler: its class with these settings."""
    return type(scheduler) is spec.scheduler and all(
        scheduler.config.get(key) == value for key, value in spec.overrides.items()
    )


def _follows(spec: Sampler, config: Mapping[str, Any]) -> bool:
    known = inspect.signature(spec.scheduler.__init__).parameters
    return all(key in known for key in _NOISE_LEVELS if config.get(key)) and _runs(spec, config)


def _runs(spec: Sampler, config: Mapping[str, Any]) -> bool:
    """Whether the scheduler accepts the config: few know every beta schedule and prediction type."""
    try:
        scheduler = spec.scheduler.from_config(dict(config), **spec.overrides)
        scheduler.set_timesteps(_PROBE_STEPS)
        sample = torch.ones(1, 1, 1, 1)
        scaled_input(scheduler, sample, scheduler.timesteps[0])
        arguments = step_arguments(scheduler, torch.Generator().manual_seed(0))
        scheduler.step(sample, scheduler.timesteps[0], sample, **arguments)
    except Exception as error:  # anything: NotImplementedError, ValueError, a package that is not installed
        log.debug("sampler left out", extra={"scheduler": spec.scheduler.__name__, "reason": str(error)})
        return False
    return True


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
