"""`GenerationConfig`: what one image, or one set of images, should be. The wire format of a job.

A config is frozen. `resolved()` fills in what a caller may leave open (seed, size) and checks it against the
model's card; what is queued and stored is always resolved, so every stored config reproduces its image.
Images that go in are named by the SHA-256 of their uploaded file (`uploads.py`), LoRAs, ControlNets and models by
the names their operator registered: a config never holds a path or an address.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.prompt import parse_weights, refuse_weights

MAX_PROMPT_CHARACTERS = 4_000
MAX_SIDE = 8_192  # pixels
MAX_STEPS = 1_000  # the training timesteps of every supported family
LCM_MAX_STEPS = 50  # original_inference_steps of diffusers' LCMScheduler
MAX_GUIDANCE = 100.0
MAX_IMAGES = 64
MAX_SEED = 2**53 - 1  # the largest integer that survives JSON readers which use doubles
DRAWN_SEED_BITS = 32
DEFAULT_STRENGTH = 0.75  # of image-to-image


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
    MODEL = "model"  # the scheduler that the model comes with, where it is none of these


class OutputFormat(StrEnum):
    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"
    GIF = "gif"  # video
    MP4 = "mp4"  # video
    PLY = "ply"  # 3D mesh with vertex colors
    WAV = "wav"  # sound
    FLAC = "flac"  # sound

    @property
    def content_type(self) -> str:
        others = {"mp4": "video/mp4", "ply": "model/ply", "wav": "audio/wav", "flac": "audio/flac"}
        return others.get(self.value, f"image/{self.value}")


class Feature(StrEnum):
    """What a config may ask for beyond a prompt. A model's card says which of these it can do."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINTING = "inpainting"
    PROMPT_WEIGHTS = "prompt_weights"
    LORA = "lora"
    CONTROLNET = "controlnet"
    REFINER = "refiner"
    ENSEMBLE = "ensemble"
    PREVIEW = "preview"
    TEXT_TO_VIDEO = "text_to_video"
    TEXT_TO_3D = "text_to_3d"
    TEXT_TO_AUDIO = "text_to_audio"
    EDIT = "edit"  # reference images, to change or to follow
    CONTROL_IMAGE = "control_image"  # of a pipeline that always has one


_NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=_NAME_PATTERN)]  # of a model, a LoRA or a ControlNet: registered, never a path
UploadId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256 of an uploaded image
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraUse(_Part):
    """A LoRA (Hu et al. 2021) by its registered name, and how strongly it acts; 1 is as it was trained."""

    name: Name
    weight: Annotated[float, Field(ge=-10.0, le=10.0)] = 1.0


class ControlUse(_Part):
    """A ControlNet (Zhang et al. 2023) with its control image.

    `start` and `end` are shares of the steps between which it acts, as in diffusers' `control_guidance_start`.
    """

    name: Name
    image: UploadId
    scale: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    start: Share = 0.0
    end: Share = 1.0

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Self:
        if self.start >= self.end:
            raise PydanticCustomError("range", "start must be below end", {"remedy": "use a start below end"})
        return self


class RefinerUse(_Part):
    """Another model takes over the unfinished latents after the share `start` of the steps (SDXL's hand-over)."""

    model: Name
    start: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8


Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Side = Annotated[int, Field(ge=8, le=MAX_SIDE, multiple_of=8)]


class GenerationConfig(BaseModel):
    """One job's worth of images. Frozen and hashable.

    Sizes are pixels; `None` means the model's native size. A `None` seed is drawn at submission. Image number
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
    model: Name = "demo"
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    output_format: OutputFormat = OutputFormat.PNG
    # Image-to-image and inpainting. Uploads are fitted to width and height before they are used.
    init_image: UploadId | None = None
    mask_image: UploadId | None = None  # white is painted anew, black is kept
    strength: Share | None = None  # 0 gives the source back, 1 ignores it; None: 0.75, or 1 with a mask
    loras: Annotated[tuple[LoraUse, ...], Field(max_length=8)] = ()
    controls: Annotated[tuple[ControlUse, ...], Field(max_length=4)] = ()
    refiner: RefinerUse | None = None
    ensemble: Annotated[tuple[Name, ...], Field(max_length=7)] = ()  # further models that make the same images
    preview_every: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 0  # steps between previews while it runs; 0: none
    num_frames: Annotated[int, Field(ge=1, le=128)] | None = None  # of a video; None: the model's own

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        """Fields that only mean something together."""
        for wrong, field, problem, remedy in (
            (
                self.mask_image is not None and self.init_image is None,
                "mask_image",
                "a mask needs the image it belongs to",
                "give init_image too, or leave the mask out",
            ),
            (
                self.strength is not None and self.init_image is None,
                "strength",
                "says how far a source image changes, but there is none",
                "give init_image too, or leave strength out",
            ),
            (
                len(set(self.ensemble) | {self.model}) <= len(self.ensemble),
                "ensemble",
                "names a model twice",
                "name each further model once, and not `model` itself",
            ),
            (
                len({lora.name for lora in self.loras}) < len(self.loras),
                "loras",
                "names a LoRA twice",
                "name each LoRA once, with the sum of its weights",
            ),
            (
                self.refiner is not None and self.mask_image is not None,
                "refiner",
                "cannot take over an inpainting, whose kept part belongs to the first model",
                "leave refiner or mask_image out",
            ),
            (
                self.refiner is not None and self.refiner.model in (self.model, *self.ensemble),
                "refiner",
                "is one of the models that begin",
                "name another model as refiner, or leave it out",
            ),
        ):
            if wrong:
                value = self.model_dump(mode="json")[field]
                raise PydanticCustomError(
                    "parts", "{problem}", {"field": field, "value": value, "problem": problem, "remedy": remedy}
                )
        return self

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

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that must be at hand to run this, `model` first."""
        return (self.model, *self.ensemble, *((self.refiner.model,) if self.refiner else ()))

    @property
    def image_count(self) -> int:
        """Images the whole job makes: `num_images` by each model of the ensemble."""
        return self.num_images * (1 + len(self.ensemble))

    @property
    def cost(self) -> int:
        """Work of a resolved config, for fair shares: row-steps, by the images' size in blocks of 64x64 pixels."""
        assert self.width is not None
        assert self.height is not None
        blocks = max(1, self.width * self.height // 4096)
        return self.image_count * self.num_inference_steps * (1 + self.guided) * blocks * (self.num_frames or 1)

    @property
    def uploads(self) -> tuple[str, ...]:
        """Uploaded images this refers to."""
        named = (self.init_image, self.mask_image, *(control.image for control in self.controls))
        return tuple(dict.fromkeys(upload for upload in named if upload is not None))

    @property
    def features(self) -> frozenset[Feature]:
        """What this asks of its model, beyond a prompt."""
        asked = {
            Feature.IMAGE_TO_IMAGE: self.init_image is not None and self.mask_image is None,
            Feature.INPAINTING: self.mask_image is not None,
            Feature.TEXT_TO_IMAGE: self.init_image is None,
            Feature.LORA: bool(self.loras),
            Feature.CONTROLNET: bool(self.controls),
            Feature.REFINER: self.refiner is not None,
            Feature.ENSEMBLE: bool(self.ensemble),
            Feature.PREVIEW: self.preview_every > 0,
        }
        return frozenset(feature for feature, wanted in asked.items() if wanted)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build from untrusted values; the first problem becomes one clear `InvalidRequest`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise invalid_request(error) from error

    def resolved(self, card: ModelCard) -> Self:
        """The same config with all that was left open filled in, checked against the model's card.

        Seed and size are filled in, and `strength`; sampler and output format become the model's own if the caller
        left them at their default and the model does not have that.

        Raises:
            InvalidRequest: the model cannot do this: a size, a sampler, a feature, a LoRA or ControlNet it lacks.
        """
        native_width, native_height = card.native_size(self.width, self.height)
        seed = self.seed if self.seed is not None else secrets.randbits(DRAWN_SEED_BITS)
        if seed + self.num_images - 1 > MAX_SEED:
            raise InvalidRequest(
                f"image {self.num_images} would use a seed above {MAX_SEED}",
                field="seed",
                value=seed,
                remedy=f"use a seed of at most {MAX_SEED - self.num_images + 1}",
            )
        found: dict[str, Any] = {"width": native_width, "height": native_height, "seed": seed}
        if "sampler" not in self.model_fields_set and self.sampler not in card.samplers:
            found["sampler"] = card.samplers[0]
        if "output_format" not in self.model_fields_set and self.output_format not in card.output_formats:
            found["output_format"] = card.output_formats[0]
        if self.init_image is not None and self.strength is None:
            found["strength"] = DEFAULT_STRENGTH if self.mask_image is None else 1.0
        config = self.model_copy(update=found)
        card.check(config)
        check_prompt = parse_weights if Feature.PROMPT_WEIGHTS in card.features else refuse_weights
        check_prompt(config.prompt, field="prompt")
        check_prompt(config.negative_prompt, field="negative_prompt")
        return config

    def canonical_json(self) -> str:
        """One spelling for equal configs: sorted keys, no spaces; parts that are not used are left out."""
        values = {k: v for k, v in self.model_dump(mode="json").items() if k not in _UNUSED or v != _UNUSED[k]}
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex. Equal configs, and only those, have equal digests."""
        return digest_of(self.canonical_json())


def digest_of(text: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


# Absent from the canonical spelling at these values, so that plain jobs stay small in Redis and keep their digests
# when a later version adds parts.
_UNUSED: Mapping[str, Any] = {
    "init_image": None,
    "mask_image": None,
    "strength": None,
    "loras": [],
    "controls": [],
    "refiner": None,
    "ensemble": [],
    "preview_every": 0,
    "num_frames": None,
}

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
    return explained(error.errors(include_url=False)[0])


def explained(first: Mapping[str, Any]) -> InvalidRequest:
    """One of pydantic's complaints, as one sentence with a remedy."""
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
    remedies |= {kind: str(context["remedy"])} if "remedy" in context else {}
    return InvalidRequest(
        problem[:1].lower() + problem[1:], field=field, value=value, remedy=remedies.get(kind, "correct it")
    )


def _choices(field: str) -> type[StrEnum]:
    return OutputFormat if field == "output_format" else SamplerType


def _nearest_multiple(value: object, factor: object) -> str:
    if not isinstance(value, int) or not isinstance(factor, int):
        return f"a multiple of {factor}"
    below = max(factor, value // factor * factor)
    return f"{below} or {below + factor}"
