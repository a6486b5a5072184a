"""The options of `calotype train`, a model for each recipe: names, bounds, defaults and help are written here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from calotype_shared.errors import SettingsError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


_CHANNELS = (16, 32, 96, 256)


def _numbers(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


class TrainOptions(BaseModel):
    """What all recipes take."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    recipe: ClassVar[str]

    model: str = "demo"
    """`demo`, or the folder of a Stable Diffusion pipeline."""
    data: Path
    """Folder with images and their metadata.jsonl."""
    out: Path
    """What to write; checkpoints go to OUT.training beside it."""
    steps: Positive = 1000
    """Optimizer steps."""
    batch_size: Positive = 8
    """Images per step."""
    learning_rate: AboveZero = 1e-3
    """At its highest, after the warm-up."""
    warmup_steps: Count = 50
    """Steps over which the rate rises."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Of the rate, after the warm-up."""
    weighting: Literal["uniform", "min-snr", "noisy"] = "uniform"
    """Of the timesteps' errors."""
    snr_gamma: AboveZero = 5.0
    """For min-snr."""
    caption_dropout: Share = 0.1
    """Share of empty captions."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2
    """Of AdamW."""
    seed: int = 0
    """Of everything random."""
    hold_out: Share = 0.1
    """Share of the images to judge by, 32 at most."""
    validation_prompts: Path | None = None
    """File with one prompt per line, for the sample sheets."""
    checkpoint_every: Count = 200
    """Steps; 0: only at the end."""
    sample_every: Count = 500
    """Steps; 0: only at the end."""
    resume: bool = False
    """Go on from the last checkpoint."""
    device: str = "cpu"
    """cpu or cuda:N."""


class LoraOptions(TrainOptions):
    """Train a style or a subject, as a small file."""

    recipe = "lora"

    rank: Positive = 8
    """Of the update's matrices."""
    alpha: AboveZero | None = None
    """Scale times rank; none: the rank."""
    targets: str = "to_q,to_k,to_v,to_out.0"
    """Endings of the layers' names."""


class TextualInversionOptions(TrainOptions):
    """Train a new word."""

    recipe = "textual-inversion"

    batch_size: Annotated[Positive, Field(description="Images per step.")] = 4
    learning_rate: Annotated[AboveZero, Field(description="At its highest, after the warm-up.")] = 5e-3
    caption_dropout: Annotated[Share, Field(description="Share of empty captions.")] = 0.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Of AdamW.")] = 0.0
    token: str
    """The new word as captions write it, such as `<my-thing>`."""
    initialize_from: str
    """A known word to start from."""
    vectors: Positive = 1
    """Tokens that the word stands for."""


class ControlNetOptions(TrainOptions):
    """Train control by an image, such as an outline."""

    recipe = "controlnet"

    batch_size: Annotated[Positive, Field(description="Images per step.")] = 4
    learning_rate: Annotated[AboveZero, Field(description="At its highest, after the warm-up.")] = 1e-4
    steps: Annotated[Positive, Field(description="Optimizer steps.")] = 5000
    embedding_channels: Annotated[tuple[Positive, ...], BeforeValidator(_numbers), Field(min_length=1)] = _CHANNELS
    """Widths separated by commas: one per halving, and one more."""
    light: bool = False
    """Without attention: much smaller, but prompts have no effect on it."""


RECIPES: tuple[type[TrainOptions], ...] = (LoraOptions, TextualInversionOptions, ControlNetOptions)


def checked(kind: type[TrainOptions], given: dict[str, Any]) -> TrainOptions:
    """
    Raises:
        SettingsError: naming the option, its value and what would do.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise SettingsError(f"{option}={first['input']!r}: {first['msg']}; correct the option") from None
