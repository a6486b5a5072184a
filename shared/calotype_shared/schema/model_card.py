"""`ModelCard`: what a model can do. Workers publish it, so that invalid requests are refused before queueing."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from calotype_shared.errors import InvalidRequest


class NetworkMerging(BaseModel):
    """Whether the calls of one network of a pipeline are merged, as its worker found at start."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    network: str
    merged: bool
    reason: str = ""  # why some or all calls run alone; empty: none do


class ModelCard(BaseModel):
    """The capabilities of one model.

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
    needs: tuple[str, ...] = ()  # fields without which it makes nothing
    default_sampler: str | None = None  # None: the config's own default, if the model has it
    default_steps: int | None = None
    default_guidance: float | None = None
    networks: tuple[NetworkMerging, ...] = ()  # of a model that runs by its own pipeline
    description: str = ""

    def native_size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """The size in pixels to use if one or both sides were not given."""
        default_width, default_height = self.native_sizes[0]
        if width is None and height is None:
            return default_width, default_height
        for native_width, native_height in self.native_sizes:  # a native size with the given side
            if width in (None, native_width) and height in (None, native_height):
                return native_width, native_height
        return width or default_width, height or default_height

    def check_size(self, width: int, height: int) -> None:
        """Check that the model can make images of a size.

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
