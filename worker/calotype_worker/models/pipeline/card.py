"""A pipeline's card, from the signature of its `__call__`, its configs, and the results of a first run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from calotype_shared.schema.enums import Feature, OutputFormat, SamplerType
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.latent import Adapters
from calotype_worker.models.pipeline.arguments import Arguments
from calotype_worker.models.pipeline.controls import names_of
from calotype_worker.models.pipeline.copies import parts
from calotype_worker.sampling.samplers import FLOW_SAMPLERS, SAMPLERS, Sampler, sampler_of

_AREA_LIMIT = 4  # times the native area
_USUAL_SIDES = {"unet": 512, "transformer": 1024}  # pixels, where nothing says another
_FORMATS: Mapping[str, Sequence[OutputFormat]] = {
    "image": (OutputFormat.PNG, OutputFormat.WEBP, OutputFormat.JPEG),
    "video": (OutputFormat.MP4, OutputFormat.GIF),
    "audio": (OutputFormat.WAV, OutputFormat.FLAC),
    "mesh": (OutputFormat.PLY, OutputFormat.GIF),
}


def size_multiple(pipeline: Any) -> int:
    """Pixels per latent cell times the network's patches."""
    factor = _number(pipeline, "vae_scale_factor_spatial", "vae_scale_factor", "vae_spatial_compression_ratio") or 8
    network = next((part for name, part in parts(pipeline) if name in ("transformer", "unet")), None)
    if "frame_size" in Arguments(pipeline).signature:
        return 32  # diffusers renders 20 views in batches of 4096 rays and drops the remainder
    patch = getattr(getattr(network, "config", None), "patch_size", None)
    if isinstance(patch, list | tuple):
        patch = patch[-1]
    is_transformer = any(name == "transformer" for name, _ in parts(pipeline))
    return math.lcm(8, factor * max(2 if is_transformer else 1, int(patch or 1)))


def native_sizes(pipeline: Any, arguments: Arguments, notes: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """(width, height) in pixels, the default first."""
    if "native_sizes" in notes:
        return tuple((int(width), int(height)) for width, height in notes["native_sizes"])
    width, height = arguments.signature.default("width"), arguments.signature.default("height")
    if isinstance(width, int) and isinstance(height, int):
        return ((width, height),)
    width, height = (_number(pipeline, name) for name in ("default_width", "default_height"))
    if width and height:
        return ((width, height),)
    frame = arguments.signature.default("frame_size")
    if isinstance(frame, int):
        return tuple((side, side) for side in (frame, 2 * frame, 4 * frame))
    factor = _number(pipeline, "vae_scale_factor_spatial", "vae_scale_factor") or 8
    sample: Any = _number(pipeline, "default_sample_size")
    if sample is None:
        for name, part in parts(pipeline):
            if name in ("unet", "transformer", "prior_transformer"):
                sample = getattr(getattr(part, "config", None), "sample_size", None)
                break
    if isinstance(sample, list | tuple):
        return ((int(sample[-1]) * factor, int(sample[0]) * factor),)
    usual = next((_USUAL_SIDES[name] for name, _ in parts(pipeline) if name in _USUAL_SIDES), 512)
    side = int(sample) * factor if sample else usual
    return ((side, side),)


def samplers_of(pipeline: Any) -> Mapping[SamplerType, Sampler]:
    """Those that can take the place of the pipeline's own scheduler; none if that is none of ours."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        return {}
    for family in (SAMPLERS, FLOW_SAMPLERS):
        own = sampler_of(scheduler, family)
        if own is None:
            continue
        if getattr(scheduler.config, "prediction_type", "") == "flow_prediction":
            return {own: family[own]}  # the others do not know these noise levels
        compatible = {kind.__name__ for kind in getattr(scheduler, "compatibles", ())} | {type(scheduler).__name__}
        return {
            kind: given
            for kind, given in family.items()
            if kind is own or (given.scheduler.__name__ in compatible and _takes(given, scheduler.config))
        }
    return {}


def _takes(sampler: Sampler, config: Mapping[str, Any]) -> bool:
    """Whether the sampler's scheduler knows this config's noise schedule: few know Shap-E's `exp`, for example."""
    try:
        sampler.scheduler.from_config(dict(config), **sampler.overrides)
    except (NotImplementedError, ValueError, TypeError):
        return False
    return True


def card_of(
    name: str,
    pipeline: Any,
    arguments: Arguments,
    *,
    kind: str,
    notes: Mapping[str, Any],
    version: str,
    adapters: Adapters,
) -> ModelCard:
    """`kind` is that of a first run's `Output`."""
    native = native_sizes(pipeline, arguments, notes)
    multiple = size_multiple(pipeline)
    own = sampler_of(pipeline.scheduler, SAMPLERS) if hasattr(pipeline, "scheduler") else None
    samplers = samplers_of(pipeline)
    if own is None and samplers:
        own = sampler_of(pipeline.scheduler, FLOW_SAMPLERS)
    features = set(arguments.features)
    if not arguments.needs_image:
        features.add(
            {
                "image": Feature.TEXT_TO_IMAGE,
                "video": Feature.TEXT_TO_VIDEO,
                "audio": Feature.TEXT_TO_AUDIO,
                "mesh": Feature.TEXT_TO_3D,
            }[kind].value
        )
    if adapters.loras:
        features.add(Feature.LORA.value)
    if names_of(pipeline):
        features.add(Feature.CONTROLNET.value)
    if kind == "video":
        features.add(Feature.TEXT_TO_VIDEO.value)
    sizes_are_free = "height" in arguments.signature or "frame_size" in arguments.signature or arguments.starts
    if not sizes_are_free and kind == "image":
        multiple = math.gcd(*(side for size in native for side in size))
    names = tuple(kind.value for kind in sorted(samplers, key=lambda kind: kind is not own))
    names = names or (SamplerType.MODEL.value,)
    return ModelCard(
        name=name,
        family=type(pipeline).__name__,
        version=version,
        size_multiple=multiple,
        native_sizes=tuple((_fit(width, multiple), _fit(height, multiple)) for width, height in native),
        max_pixels=int(notes.get("max_pixels", (_AREA_LIMIT if sizes_are_free else 1) * max(w * h for w, h in native))),
        max_prompt_tokens=_prompt_tokens(pipeline, arguments),
        samplers=names,
        features=frozenset(features),
        output_formats=tuple(found.value for found in _FORMATS[kind]),
        loras=tuple(sorted(adapters.loras)),
        controls=names_of(pipeline),
        embeddings=tuple(sorted(adapters.embeddings)),
        description=str(notes.get("description", "")),
        parameters=tuple(arguments.signature.free()),
        needs=arguments.needs,
        default_sampler=names[0],
        default_steps=arguments.default_steps,
        default_guidance=arguments.default_guidance,
    )


def _prompt_tokens(pipeline: Any, arguments: Arguments) -> int:
    longest = arguments.signature.default("max_sequence_length")
    if isinstance(longest, int) and longest > 0:
        return longest
    found = [
        int(part.model_max_length)
        for name, part in parts(pipeline)
        if name.rpartition(".")[2].startswith("tokenizer") and hasattr(part, "model_max_length")
    ]
    return max(1, min([*found, 4096]))


def _fit(side: int, multiple: int) -> int:
    return max(multiple, side // multiple * multiple)


def _number(pipeline: Any, *names: str) -> int | None:
    for name in names:
        found = getattr(pipeline, name, None)
        if isinstance(found, int | float) and found >= 1:
            return int(found)
    return None
