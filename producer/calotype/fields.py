"""`JobFields`: the fields of a config as keyword arguments, for type checkers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from calotype.job_image import ImageSource
from calotype_shared.schema.config import ControlUse, LoraUse, RefinerUse


class JobFields(TypedDict, total=False):
    """Every field of `GenerationConfig`, and `quality`. Images can be given instead of the ids of their uploads."""

    prompt: str
    negative_prompt: str
    width: int | None
    height: int | None
    num_inference_steps: int
    guidance_scale: float
    seed: int | None
    sampler: str  # a SamplerType or its value
    model: str
    num_images: int
    output_format: str  # an OutputFormat or its value
    init_image: ImageSource | str | None
    mask_image: ImageSource | str | None
    strength: float | None
    loras: Sequence[LoraUse | Mapping[str, Any]]
    controls: Sequence[ControlUse | Mapping[str, Any]]
    refiner: RefinerUse | Mapping[str, Any] | None
    ensemble: Sequence[str]
    preview_every: int
    num_frames: int | None
    fps: float | None
    audio_seconds: float | None
    images: Sequence[ImageSource | str]
    control_image: ImageSource | str | None
    parameters: Mapping[str, Any]
    quality: str | None  # fast, balanced or high: steps and guidance at once
