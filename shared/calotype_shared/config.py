"""`GenerationConfig`: what one picture, or one set of pictures, should be. The wire format of a job.

A config is frozen. `resolved()` fills in what a caller may leave open (seed, size) and checks it against the
model's card; what is queued and stored is always resolved, so every stored config reproduces its picture.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from calotype_shared.errors import InvalidRequest
from calotype_shared.model_card import ModelCard

MAX_PROMPT_CHARACTERS = 4_000
MAX_SIDE = 8_192  # pixels
MAX_STEPS = 1_000  # the training timesteps of every supported family
LCM_MAX_STEPS = 50  # original_inference_steps of diffusers' LCMScheduler
MAX_GUIDANCE = 100.0
MAX_IMAGES = 64
MAX_SEED = 2**53 - 1  # the largest integer that survives JSON readers which use doubles
DRAWN_SEED_BITS = 32


class SamplerType(StrEnum):
    """Sampling algorithms. diffusers calls these schedulers."""

    DDPM = "ddpm"  # Denoising Diffusion Probabilistic Models, Ho et al. 2020
    DDIM = "ddim"  # Denoising Diffusion Implicit Models, Song et al. 2020
    PNDM = "pndm"  # Pseudo Numerical Methods, Liu et al. 2022
    EULER = "euler"  # Karras et al. 2022, algorithm 2 without churn
    EULER_A = "euler_a"  # Euler with ancestral noise
    HEUN = "heun"  # Karras et al. 2022, second order: 2N - 1 network calls
    DPMPP_2M = "dpmpp_2m"  # DPM-Solver++(2M), Lu et al. 2022
    DPMPP_2M_KARRAS = "dpmpp_2m_karras"  # the same on Karras' noise levels
    UNIPC = "unipc"  # UniPC, Zhao et al. 2023
    LCM = "lcm"  # Latent Consistency Models, Luo et al. 2023


class OutputFormat(StrEnum):
    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"

    @property
    def content_type(self) -> str:
        return f"image/{self.value}"


Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Side = Annotated[int, Field(ge=8, le=MAX_SIDE, multiple_of=8)]


class GenerationConfig(BaseModel):
    """One job's worth of pictures. Frozen and hashable.

    Sizes are pixels; `None` means the model's native size. A `None` seed is drawn at submission. Picture number
    i of `num_images` uses `seed + i`, so any one of them can be made again alone. `guidance_scale` of 1 or less
    means no classifier-free guidance (Ho & Salimans 2022) and costs half; the negative prompt is then unused.

    Raises:
        InvalidRequest: from `parse`, naming the field, the value and the remedy. The bare constructor raises
            pydantic's `ValidationError`, which lists every bad field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_strip_whitespace=True)

    prompt: Prompt
    negative_prompt: Prompt = ""
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 50
    guidance_scale: Annotated[float, Field(ge=0.0, le=MAX_GUIDANCE)] = 7.5
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    sampler: SamplerType = SamplerType.DDIM
    model: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] = "demo"
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    output_format: OutputFormat = OutputFormat.PNG

    @model_validator(mode="after")
    def _within_the_sampler(self) -> Self:
        """LCM's schedule has 50 original steps, and it can do no more than those."""
        if self.sampler is SamplerType.LCM and self.num_inference_steps > LCM_MAX_STEPS:
            raise PydanticCustomError(
                "lcm_steps",
                "sampler 'lcm' runs at most {most} steps",
                {"field": "num_inference_steps", "value": self.num_inference_steps, "most": LCM_MAX_STEPS},
            )
        return self

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on; the same rule as diffusers' `do_classifier_free_guidance`."""
        return self.guidance_scale > 1.0

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build from untrusted values; the first problem becomes one clear `InvalidRequest`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise invalid_request(error) from error

    def resolved(self, card: ModelCard) -> Self:
        """The same config with seed and size filled in, checked against the model's card.

        Raises:
            InvalidRequest: a side is no multiple of the model's factor, or above its limits.
        """
        native_width, native_height = card.native_size(self.width, self.height)
        seed = self.seed if self.seed is not None else secrets.randbits(DRAWN_SEED_BITS)
        if seed + self.num_images - 1 > MAX_SEED:
            raise InvalidRequest(
                f"picture {self.num_images} would use a seed above {MAX_SEED}",
                field="seed",
                value=seed,
                remedy=f"use a seed of at most {MAX_SEED - self.num_images + 1}",
            )
        config = self.model_copy(update={"width": native_width, "height": native_height, "seed": seed})
        card.check_size(native_width, native_height)
        return config

    def canonical_json(self) -> str:
        """One spelling for equal configs: sorted keys, no spaces, every field present."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex. Equal configs, and only those, have equal digests."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


# Quality presets, by the numbers of the project's founding document.
QUALITY_PRESETS: Mapping[str, Mapping[str, int | float]] = {
    "fast": {"num_inference_steps": 20, "guidance_scale": 7.0},
    "balanced": {"num_inference_steps": 50, "guidance_scale": 7.5},
    "high": {"num_inference_steps": 100, "guidance_scale": 8.0},
}


def quality_preset(quality: str) -> Mapping[str, int | float]:
    """Steps and guidance of a preset: `fast`, `balanced` or `high`."""
    try:
        return QUALITY_PRESETS[quality]
    except KeyError:
        raise InvalidRequest(
            "unknown quality preset", field="quality", value=quality, remedy=f"use one of {', '.join(QUALITY_PRESETS)}"
        ) from None


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first of pydantic's complaints, as one sentence with a remedy."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "config"
    kind = first["type"]
    context = first.get("ctx", {})
    field = str(context.get("field", field))
    value = None if kind == "missing" else context.get("value", first.get("input"))
    remedies = {
        "missing": "give it",
        "extra_forbidden": f"remove it, or use one of: {', '.join(GenerationConfig.model_fields)}",
        "enum": f"use one of: {', '.join(s.value for s in _choices(field))}",
        "multiple_of": f"use {_nearest_multiple(value, context.get('multiple_of', 8))}",
        "greater_than_equal": f"use at least {context.get('ge')}",
        "less_than_equal": f"use at most {context.get('le')}",
        "lcm_steps": f"use at most {context.get('most')}, or another sampler",
        "string_too_long": f"shorten it to {context.get('max_length')} characters",
        "finite_number": "use a finite number",
        "string_pattern_mismatch": "use lower-case letters, digits, '.', '_' and '-' (a registered name, not a path)",
    }
    problem = str(first["msg"]).removeprefix("Value error, ")
    return InvalidRequest(
        problem[:1].lower() + problem[1:], field=field, value=value, remedy=remedies.get(kind, "correct it")
    )


def _choices(field: str) -> type[StrEnum]:
    return OutputFormat if field == "output_format" else SamplerType


def _nearest_multiple(value: object, factor: object) -> str:
    if not isinstance(value, int) or not isinstance(factor, int):
        return f"a multiple of {factor}"
    below = max(factor, math.floor(value / factor) * factor)
    return f"{below} or {below + factor}"
