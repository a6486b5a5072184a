"""`GenerationConfig`: what a job should generate. The wire format of a job.

A config is frozen, and can leave fields open (seed, size). `resolve.resolve` fills these in and checks the config
against the cards of its models. What is queued and stored is always a `ResolvedConfig`, which reproduces its images.
Images that go in are named by the SHA-256 of their uploaded file (`uploads.py`), LoRAs, ControlNets and models by
the names their operator registered: a config never holds a path or an address.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from calotype_shared.schema.enums import Feature, OutputFormat, SamplerType
from calotype_shared.schema.refusal import invalid_request

MAX_PROMPT_CHARACTERS = 4_000
MAX_SIDE = 8_192  # pixels
MAX_STEPS = 1_000  # the training timesteps of every supported family
LCM_MAX_STEPS = 50  # original_inference_steps of diffusers' LCMScheduler
MAX_GUIDANCE = 100.0
MAX_IMAGES = 64
MAX_SEED = 2**53 - 1  # the largest integer that survives JSON readers which use doubles
DEFAULT_STRENGTH = 0.75  # of image-to-image


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
    """Another model takes over the unfinished latents after the share `start` of the steps (as SDXL's refiner)."""

    model: Name
    start: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8


Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Side = Annotated[int, Field(ge=8, le=MAX_SIDE, multiple_of=8)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class GenerationConfig(BaseModel):
    """One job's worth of images. Frozen and hashable.

    Sizes are pixels; `None` means the model's native size. A `None` seed is drawn at submission. Image number
    i of `num_images` uses `seed + i`, so each image can be reproduced alone. `guidance_scale` of 1 or less
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
    seed: Seed | None = None
    sampler: SamplerType = SamplerType.DDIM
    model: Name = "demo"
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    output_format: OutputFormat = OutputFormat.PNG
    # Image-to-image and inpainting. Uploads are fitted to width and height before they are used.
    init_image: UploadId | None = None
    mask_image: UploadId | None = None  # white is repainted, black is kept
    strength: Share | None = None  # 0 returns the source, 1 ignores it; None: 0.75, or 1 with a mask
    loras: Annotated[tuple[LoraUse, ...], Field(max_length=8)] = ()
    controls: Annotated[tuple[ControlUse, ...], Field(max_length=4)] = ()
    refiner: RefinerUse | None = None
    ensemble: Annotated[tuple[Name, ...], Field(max_length=7)] = ()  # additional models that make the same images
    preview_every: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 0  # steps between previews while it runs; 0: none
    num_frames: Annotated[int, Field(ge=1, le=1024)] | None = None  # of a video; None: the model's own
    fps: Annotated[float, Field(gt=0.0, le=120.0)] | None = None  # of a video; None: the model's own
    audio_seconds: Annotated[float, Field(gt=0.0, le=600.0)] | None = None  # None: the model's own
    # References that a model edits or follows, in their own sizes.
    images: Annotated[tuple[UploadId, ...], Field(max_length=16)] = ()
    control_image: UploadId | None = None  # for models that always follow one; fitted to width and height
    # Of the pipeline's own, by its names, as far as its card lists them.
    parameters: Annotated[dict[str, JsonValue], Field(max_length=32)] = Field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.canonical_json())

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        """Fields that only mean something together."""
        for wrong, field, problem, remedy in (
            (
                self.mask_image is not None and self.init_image is None,
                "mask_image",
                "a mask needs a source image",
                "give init_image too, or leave the mask out",
            ),
            (
                self.strength not in (None, 1.0) and self.init_image is None,
                "strength",
                "needs a source image",
                "give init_image too, or leave strength out",
            ),
            (
                len(set(self.ensemble) | {self.model}) <= len(self.ensemble),
                "ensemble",
                "contains a model twice",
                "list each additional model once, and not `model` itself",
            ),
            (
                len({lora.name for lora in self.loras}) < len(self.loras),
                "loras",
                "contains a LoRA twice",
                "list each LoRA once, with the sum of its weights",
            ),
            (
                self.refiner is not None and self.mask_image is not None,
                "refiner",
                "cannot be combined with mask_image",
                "leave refiner or mask_image out",
            ),
            (
                self.refiner is not None and self.refiner.model in (self.model, *self.ensemble),
                "refiner",
                "is also the model itself or part of the ensemble",
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
        """All models that this config needs, `model` first."""
        return (self.model, *self.ensemble, *((self.refiner.model,) if self.refiner else ()))

    @property
    def image_count(self) -> int:
        """Images the whole job makes: `num_images` by each model of the ensemble."""
        return self.num_images * (1 + len(self.ensemble))

    @property
    def uploads(self) -> tuple[str, ...]:
        """Uploaded images this refers to."""
        controls = (self.control_image, *(control.image for control in self.controls))
        named = (self.init_image, self.mask_image, *self.images, *controls)
        return tuple(dict.fromkeys(upload for upload in named if upload is not None))

    @property
    def features(self) -> frozenset[Feature]:
        """The features that this config needs."""
        return features_asked(
            source=self.init_image is not None,
            mask=self.mask_image is not None,
            references=bool(self.images),
            control_image=self.control_image is not None,
            loras=bool(self.loras),
            controls=bool(self.controls),
            refiner=self.refiner is not None,
            ensemble=bool(self.ensemble),
            previews=self.preview_every > 0,
        )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build from untrusted values; the first problem becomes one clear `InvalidRequest`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise invalid_request(error, fields=cls.model_fields) from error

    def canonical_json(self) -> str:
        """The canonical form, identical for equal configs: sorted keys, no spaces, unused parts left out."""
        values = {k: v for k, v in self.model_dump(mode="json").items() if k not in _UNUSED or v != _UNUSED[k]}
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex. Equal configs, and only those, have equal digests."""
        return digest_of(self.canonical_json())


def features_asked(
    *,
    source: bool,
    mask: bool,
    references: bool,
    control_image: bool,
    loras: bool,
    controls: bool,
    refiner: bool,
    previews: bool,
    ensemble: bool = False,
) -> frozenset[Feature]:
    """What a model must be able to do for a config, or for one image of it, that has these parts."""
    asked = {
        Feature.IMAGE_TO_IMAGE: source and not mask,
        Feature.INPAINTING: mask,
        Feature.TEXT_TO_IMAGE: not source and not references,
        Feature.EDIT: references,
        Feature.CONTROL_IMAGE: control_image,
        Feature.LORA: loras,
        Feature.CONTROLNET: controls,
        Feature.REFINER: refiner,
        Feature.ENSEMBLE: ensemble,
        Feature.PREVIEW: previews,
    }
    return frozenset(feature for feature, wanted in asked.items() if wanted)


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
    "fps": None,
    "audio_seconds": None,
    "images": [],
    "control_image": None,
    "parameters": {},
}
