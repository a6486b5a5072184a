"""`resolve`: completes a config and checks it against model cards. The result is a `ResolvedConfig`.

Producers call it before a job is queued, and the worker's engine before an image is admitted. Two checks need more than
the cards and are elsewhere: whether uploads are in storage, and whether one worker serves all models of a config.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from pydantic import Field, ValidationInfo, field_serializer, field_validator

from calotype_shared.errors import InvalidRequest, UnknownModel
from calotype_shared.schema.config import DEFAULT_STRENGTH, MAX_SEED, GenerationConfig, Seed, Share, Side
from calotype_shared.schema.enums import Feature, OutputFormat, SamplerType
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.prompt import parse_weights, refuse_other_notation, refuse_weights

DRAWN_SEED_BITS = 32
IMAGE_FIELDS = ("init_image", "mask_image", "images", "control_image")


class ResolvedConfig(GenerationConfig):
    """A config with no open fields. Queue, worker, engine and job records use this type.

    The JSON is that of a `GenerationConfig`, so it can be submitted again. Without a source image, `strength` is 1,
    because nothing of a source is kept, and is written as null.
    """

    width: Side
    height: Side
    seed: Seed
    strength: Share = Field(default=None, validate_default=True)

    @field_validator("strength", mode="before")
    @classmethod
    def _read_null(cls, strength: object, info: ValidationInfo) -> object:
        return 1.0 if strength is None and info.data.get("init_image") is None else strength

    @field_serializer("strength")
    def _write_null(self, strength: float) -> float | None:
        return None if self.init_image is None else strength

    @property
    def lora_names(self) -> tuple[str, ...]:
        """The LoRAs that it uses, by the names that an operator has registered."""
        return tuple(lora.name for lora in self.loras)

    @property
    def given(self) -> frozenset[str]:
        """Names of the image fields that are set. An image in `controls` counts as a control image."""
        found = {name for name in IMAGE_FIELDS if getattr(self, name)}
        return frozenset(found | {"control_image"} if self.controls else found)

    @property
    def control_names(self) -> tuple[str, ...]:
        """The same of ControlNets."""
        return tuple(control.name for control in self.controls)

    @property
    def cost(self) -> int:
        """Work for fair shares: row-steps, by the images' size in blocks of 64x64 pixels."""
        blocks = max(1, self.width * self.height // 4096)
        return self.image_count * self.num_inference_steps * (1 + self.guided) * blocks * (self.num_frames or 1)


def draw_seed() -> int:
    """A random seed for a config without one."""
    return secrets.randbits(DRAWN_SEED_BITS)


def _own_or_first(default: str, known: tuple[str, ...]) -> str:
    """The config's default if the model supports it, otherwise the model's first."""
    return default if default in known else known[0]


# Every field that a caller can leave open, and how it is filled in: from the given config, the card of its
# model, and the source of seeds. A field is open if it is None or was not given.
FILLED: Mapping[str, Callable[[GenerationConfig, ModelCard, Callable[[], int]], Any]] = {
    "width": lambda config, card, draw: card.native_size(config.width, config.height)[0],
    "height": lambda config, card, draw: card.native_size(config.width, config.height)[1],
    "seed": lambda config, card, draw: draw(),
    "sampler": lambda config, card, draw: card.default_sampler or _own_or_first(config.sampler, card.samplers),
    "output_format": lambda config, card, draw: _own_or_first(config.output_format, card.output_formats),
    "num_inference_steps": lambda config, card, draw: card.default_steps or config.num_inference_steps,
    "guidance_scale": lambda config, card, draw: (
        config.guidance_scale if card.default_guidance is None else card.default_guidance
    ),
    "strength": lambda config, card, draw: DEFAULT_STRENGTH if config.init_image and not config.mask_image else 1.0,
}


def resolve(
    config: GenerationConfig, cards: Mapping[str, ModelCard], *, draw_seed: Callable[[], int] = draw_seed
) -> ResolvedConfig:
    """The complete config, if these models can make it. Resolving a resolved config returns an equal one.

    `cards` maps model names to cards. Except for a random seed, the result depends only on the arguments.

    Raises:
        UnknownModel: one of the config's models has no card.
        InvalidRequest: a model lacks a size, a sampler, a feature, a LoRA or a ControlNet.
    """
    found = [_card(cards, name) for name in config.models]
    values = {name: getattr(config, name) for name in GenerationConfig.model_fields}
    for name, fill in FILLED.items():
        if values[name] is None or name not in config.model_fields_set:
            values[name] = fill(config, found[0], draw_seed)
    resolved = ResolvedConfig.parse(values)
    if resolved.seed + resolved.num_images - 1 > MAX_SEED:
        raise InvalidRequest(
            f"image {resolved.num_images} would use a seed above {MAX_SEED}",
            field="seed",
            value=resolved.seed,
            remedy=f"use a seed of at most {MAX_SEED - resolved.num_images + 1}",
        )
    for card in found[: 1 + len(resolved.ensemble)]:
        check(resolved, card)
    for card in found[1 + len(resolved.ensemble) :]:
        check_refiner(resolved, card)
    return resolved


class Asked(Protocol):
    """What is checked against a card: a `ResolvedConfig`, or one image of it as an engine request."""

    @property
    def prompt(self) -> str: ...
    @property
    def negative_prompt(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def num_inference_steps(self) -> int: ...
    @property
    def sampler(self) -> SamplerType: ...
    @property
    def output_format(self) -> OutputFormat | None: ...  # None: any
    @property
    def num_frames(self) -> int | None: ...
    @property
    def fps(self) -> float | None: ...
    @property
    def audio_seconds(self) -> float | None: ...
    @property
    def parameters(self) -> Mapping[str, Any]: ...
    @property
    def given(self) -> frozenset[str]: ...  # of the fields that hold images
    @property
    def features(self) -> frozenset[Feature]: ...
    @property
    def lora_names(self) -> tuple[str, ...]: ...
    @property
    def control_names(self) -> tuple[str, ...]: ...


# The field of a config that asks for a feature.
_FIELDS = {
    Feature.IMAGE_TO_IMAGE: "init_image",
    Feature.INPAINTING: "mask_image",
    Feature.LORA: "loras",
    Feature.CONTROLNET: "controls",
    Feature.PREVIEW: "preview_every",
    Feature.REFINER: "refiner",
    Feature.EDIT: "images",
    Feature.CONTROL_IMAGE: "control_image",
}
# Fields that only models with a feature read.
_ONLY_WITH = {
    "num_frames": Feature.TEXT_TO_VIDEO,
    "fps": Feature.TEXT_TO_VIDEO,
    "audio_seconds": Feature.TEXT_TO_AUDIO,
}
_FROM_TEXT = {Feature.TEXT_TO_IMAGE, Feature.TEXT_TO_VIDEO, Feature.TEXT_TO_3D, Feature.TEXT_TO_AUDIO}
_BY_STEPS = {Feature.TEXT_TO_IMAGE, Feature.IMAGE_TO_IMAGE}  # latents that another model can take over


def check(asked: Asked, card: ModelCard) -> None:
    """Check that this model can make it.

    Raises:
        InvalidRequest: names the first field that the model does not support, and what would work.
    """
    _check_schedule(asked, card)
    if asked.output_format is not None:
        _check_one_of("output_format", asked.output_format, card.output_formats, card)
    for feature in sorted(asked.features - {Feature.ENSEMBLE, Feature.REFINER, Feature.TEXT_TO_IMAGE}):
        if feature not in card.features:
            raise _unable(card, feature)
    for name, feature in _ONLY_WITH.items():
        if getattr(asked, name) is not None and feature not in card.features:
            raise _unable(card, feature, field=name)
    if Feature.TEXT_TO_IMAGE in asked.features and not card.features & _FROM_TEXT:
        raise InvalidRequest(
            f"model {card.name!r} does not support text_to_image",
            field="model",
            value=card.name,
            remedy=f"provide the inputs for {', '.join(sorted(card.features))}, or use another model",
        )
    if Feature.REFINER in asked.features and not card.features & _BY_STEPS:
        raise _unable(card, Feature.REFINER)
    for name in asked.lora_names:
        _check_one_of("loras", name, card.loras, card)
    for name in asked.control_names:
        _check_one_of("controls", name, card.controls, card)
    for name in asked.parameters:
        _check_one_of("parameters", name, card.parameters, card)
    for name in card.needs:
        if name not in asked.given:
            raise InvalidRequest(f"model {card.name!r} needs it", field=name, value=None, remedy="give it")
    _check_prompts(asked, card)


def check_refiner(asked: Asked, card: ModelCard) -> None:
    """Check that this model can refine the unfinished latents of another model.

    Raises:
        InvalidRequest: it lacks the size, the sampler or prompt weights, or it cannot be stepped.
    """
    if not card.features & _BY_STEPS:
        raise InvalidRequest(
            f"model {card.name!r} cannot be used as a refiner",
            field="refiner",
            value=card.name,
            remedy="use another model as refiner, or leave it out",
        )
    _check_schedule(asked, card)
    _check_prompts(asked, card)


def _card(cards: Mapping[str, ModelCard], model: str) -> ModelCard:
    if model not in cards:
        raise UnknownModel("is not a known model", field="model", value=model, remedy=f"use one of: {', '.join(cards)}")
    return cards[model]


def _check_schedule(asked: Asked, card: ModelCard) -> None:
    card.check_size(asked.width, asked.height)
    if asked.num_inference_steps > card.max_steps:
        raise InvalidRequest(
            f"model {card.name!r} runs at most {card.max_steps} steps",
            field="num_inference_steps",
            value=asked.num_inference_steps,
            remedy=f"use at most {card.max_steps}",
        )
    _check_one_of("sampler", asked.sampler, card.samplers, card)


def _check_prompts(asked: Asked, card: ModelCard) -> None:
    check_prompt = parse_weights if Feature.PROMPT_WEIGHTS in card.features else refuse_weights
    for field, prompt in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt)):
        refuse_other_notation(prompt, field=field)
        check_prompt(prompt, field=field)


def _check_one_of(field: str, value: str, known: Collection[str], card: ModelCard) -> None:
    if value not in known:
        raise InvalidRequest(
            f"is not available for model {card.name!r}",
            field=field,
            value=str(value),
            remedy=f"available: {', '.join(known) or 'none'}",
        )


def _unable(card: ModelCard, feature: Feature, *, field: str | None = None) -> InvalidRequest:
    return InvalidRequest(
        f"model {card.name!r} does not support this",
        field=field or _FIELDS.get(feature, "config"),
        value=feature.value,
        remedy=f"it supports {', '.join(sorted(card.features))}; leave this out, or use another model",
    )
