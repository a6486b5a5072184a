"""`ModelCard`: what a worker tells producers about a model, so that a bad request is refused before queueing."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from calotype_shared.errors import InvalidRequest

if TYPE_CHECKING:
    from calotype_shared.schema.config import GenerationConfig


# The field of a config that asks for a feature.
_FIELDS = {
    "image_to_image": "init_image",
    "inpainting": "mask_image",
    "lora": "loras",
    "controlnet": "controls",
    "preview": "preview_every",
    "text_to_video": "num_frames",
}


class ModelCard(BaseModel):
    """One model as it can be asked for.

    `size_multiple` is the pixels per latent cell times what the network needs (8 × 2^(levels-1) for a UNet);
    `native_sizes` are (width, height) in pixels, the default first; `version` identifies the weights.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    family: str  # sd, sdxl, sd3, flux, animatediff, shap_e
    version: str
    size_multiple: int = Field(ge=1)
    native_sizes: tuple[tuple[int, int], ...] = Field(min_length=1)
    max_pixels: int = Field(ge=1)
    max_prompt_tokens: int = Field(ge=1)  # in one window of the text encoder
    samplers: tuple[str, ...] = Field(min_length=1)  # the model's own first
    features: frozenset[str] = frozenset({"text_to_image"})
    output_formats: tuple[str, ...] = ("png", "webp", "jpeg")
    loras: tuple[str, ...] = ()  # registered names
    controls: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()  # tokens of textual inversions, to be written in prompts
    max_steps: int = 1000
    parameters: tuple[str, ...] = ()  # of the pipeline's own that a config's `parameters` may set
    default_steps: int | None = None
    default_guidance: float | None = None
    description: str = ""

    def check(self, config: GenerationConfig) -> None:
        """Refuse a config that this model cannot make.

        Raises:
            InvalidRequest: naming the first field that asks too much, and what would work.
        """
        assert config.width is not None
        assert config.height is not None
        self.check_size(config.width, config.height)
        if config.num_inference_steps > self.max_steps:
            raise InvalidRequest(
                f"model {self.name!r} runs at most {self.max_steps} steps",
                field="num_inference_steps",
                value=config.num_inference_steps,
                remedy=f"use at most {self.max_steps}",
            )
        self._check_one_of("sampler", config.sampler, self.samplers)
        self._check_one_of("output_format", config.output_format, self.output_formats)
        for feature in sorted(config.features - {"ensemble", "refiner", "text_to_image"}):
            self._check_feature(feature)
        if "text_to_image" in config.features and not self.features & {"text_to_image", "text_to_video", "text_to_3d"}:
            raise InvalidRequest(
                f"model {self.name!r} cannot do text_to_image",
                field="model",
                value=self.name,
                remedy=f"give what it needs for {', '.join(sorted(self.features))}, or use another model",
            )
        if config.num_frames is not None:
            self._check_feature("text_to_video")
        for lora in config.loras:
            self._check_one_of("loras", lora.name, self.loras)
        for control in config.controls:
            self._check_one_of("controls", control.name, self.controls)

    def check_as_refiner(self, config: GenerationConfig) -> None:
        """Refuse to take over the unfinished latents of a config that another model begins.

        Raises:
            InvalidRequest: this model has not the size or the sampler.
        """
        assert config.width is not None
        assert config.height is not None
        self.check_size(config.width, config.height)
        self._check_one_of("sampler", config.sampler, self.samplers)

    def _check_feature(self, feature: str) -> None:
        if feature not in self.features:
            raise InvalidRequest(
                f"model {self.name!r} cannot do that",
                field=_FIELDS.get(feature, "config"),
                value=feature,
                remedy=f"it can do {', '.join(sorted(self.features))}; leave this out, or use another model",
            )

    def _check_one_of(self, field: str, value: str, known: Collection[str]) -> None:
        if value not in known:
            shown = ", ".join(known) or "none"
            raise InvalidRequest(
                f"model {self.name!r} does not have it", field=field, value=str(value), remedy=f"it has: {shown}"
            )

    def native_size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """The size in pixels to use where one or both sides were left open."""
        default_width, default_height = self.native_sizes[0]
        if width is None and height is None:
            return default_width, default_height
        for native_width, native_height in self.native_sizes:  # a native size that has the side that was given
            if width in (None, native_width) and height in (None, native_height):
                return native_width, native_height
        return width or default_width, height or default_height

    def check_size(self, width: int, height: int) -> None:
        """Refuse a size that the model cannot make.

        Raises:
            InvalidRequest: naming the side, its value and sizes that work.
        """
        for field, value in (("width", width), ("height", height)):
            if value % self.size_multiple:
                below = max(self.size_multiple, value // self.size_multiple * self.size_multiple)
                raise InvalidRequest(
                    f"must be a multiple of {self.size_multiple} for model {self.name!r}",
                    field=field,
                    value=value,
                    remedy=f"use {below} or {below + self.size_multiple}",
                )
        if width * height > self.max_pixels:
            native = ", ".join(f"{w}x{h}" for w, h in self.native_sizes)
            raise InvalidRequest(
                f"{width}x{height} is {width * height} pixels, and model {self.name!r} makes at most {self.max_pixels}",
                field="width" if width >= height else "height",
                value=max(width, height),
                remedy=f"use a smaller size; its native sizes are {native}",
            )
