"""Default steps, guidance and sampler of the step families, from a pipeline's own signature and scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.enums import SamplerType

_FEW_STEPS = 4  # what models that were distilled for few steps are shown with
_ANCESTRY = (SamplerType.EULER, SamplerType.EULER_A)


def defaults_of(pipeline: Any, samplers: Collection[SamplerType]) -> Mapping[str, Any]:
    """Fields of the card. What a config has anyway is left out, so that it may change.

    `samplers` are the model's, its own first. Models that were distilled for few steps are recognized by their
    scheduler (LCM, TCD, or Euler with trailing steps, as Turbo and Lightning have) or by a network without an input for
    guidance (Flux schnell).
    """
    signature = inspect.signature(type(pipeline).__call__).parameters
    steps = signature["num_inference_steps"].default
    guidance = signature["guidance_scale"].default
    own = next(iter(samplers))
    if type(pipeline).__name__ != "LatentConsistencyModelPipeline" and _distilled(pipeline, own):
        embedded = getattr(getattr(pipeline, "unet", None), "config", {}).get("time_cond_proj_dim")
        steps, guidance = _FEW_STEPS, guidance if embedded else 0.0
    # Those of Stable Diffusion are configs' own numbers; DDIM is their sampler of it.
    founding = own in (SamplerType.DDIM, SamplerType.PNDM) and SamplerType.DDIM in samplers
    found = {
        "default_sampler": None if founding else own.value,
        "default_steps": steps,
        "default_guidance": guidance,
    }
    fields = GenerationConfig.model_fields
    usual = {
        "default_steps": fields["num_inference_steps"].default,
        "default_guidance": fields["guidance_scale"].default,
    }
    return {key: value for key, value in found.items() if value is not None and value != usual.get(key)}


def _distilled(pipeline: Any, own: SamplerType) -> bool:
    config = pipeline.scheduler.config
    transformer = getattr(pipeline, "transformer", None)
    if transformer is not None:
        return transformer.config.get("guidance_embeds") is False
    if own is SamplerType.LCM or type(pipeline.scheduler).__name__ == "TCDScheduler":
        return True
    trailing = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
    return own in _ANCESTRY and trailing
