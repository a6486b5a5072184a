"""The options of `calotype train`, one model per recipe: names, bounds, defaults and help texts."""

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
    """The options of all recipes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    recipe: ClassVar[str]

    model: str = "demo"
    """Base model: `demo`, or the folder of a Stable Diffusion pipeline."""
    data: Path
    """Folder with images and their metadata.jsonl."""
    out: Path
    """Output; checkpoints go to OUT.training beside it."""
    steps: Positive = 1000
    """Optimizer steps."""
    batch_size: Positive = 8
    """Images per step."""
    learning_rate: AboveZero = 1e-3
    """Peak learning rate, after the warm-up."""
    warmup_steps: Count = 50
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate schedule after the warm-up."""
    weighting: Literal["uniform", "min-snr", "noisy"] = "uniform"
    """Loss weighting by timestep."""
    snr_gamma: AboveZero = 5.0
    """Gamma of min-snr."""
    caption_dropout: Share = 0.1
    """Share of captions that are replaced by empty ones."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2
    """Weight decay of AdamW."""
    seed: int = 0
    """Random seed."""
    hold_out: Share = 0.1
    """Share of images held out for validation, at most 32 images."""
    validation_prompts: Path | None = None
    """File with one prompt per line, for the sample sheets."""
    checkpoint_every: Count = 200
    """Steps between checkpoints; 0: only at the end."""
    sample_every: Count = 500
    """Steps between sample sheets; 0: only at the end."""
    resume: bool = False
    """Continue from the last checkpoint."""
    device: str = "cpu"
    """Device: cpu or cuda:N."""


class LoraOptions(TrainOptions):
    """Train a LoRA: a style or a subject, as a small file."""

    recipe = "lora"

    rank: Positive = 8
    """Rank of the added matrices."""
    alpha: AboveZero | None = None
    """Scale multiplied by the rank. None: the rank."""
    targets: str = "to_q,to_k,to_v,to_out.0"
    """Suffixes of the names of the trained layers."""


class TextualInversionOptions(TrainOptions):
    """Train a textual inversion: a new word for prompts."""

    recipe = "textual-inversion"

    batch_size: Annotated[Positive, Field(description="Images per step.")] = 4
    learning_rate: Annotated[AboveZero, Field(description="Peak learning rate, after the warm-up.")] = 5e-3
    caption_dropout: Annotated[Share, Field(description="Share of captions that are replaced by empty ones.")] = 0.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Weight decay of AdamW.")] = 0.0
    token: str
    """The new word as it appears in captions, such as `<my-thing>`."""
    initialize_from: str
    """Known word whose embedding is the starting point."""
    vectors: Positive = 1
    """Number of tokens for the word."""


class ControlNetOptions(TrainOptions):
    """Train a ControlNet: control by an image, such as an outline."""

    recipe = "controlnet"

    batch_size: Annotated[Positive, Field(description="Images per step.")] = 4
    learning_rate: Annotated[AboveZero, Field(description="Peak learning rate, after the warm-up.")] = 1e-4
    steps: Annotated[Positive, Field(description="Optimizer steps.")] = 5000
    embedding_channels: Annotated[tuple[Positive, ...], BeforeValidator(_numbers), Field(min_length=1)] = _CHANNELS
    """Channel widths of the control image's encoder, separated by commas: one per downsampling, plus one."""
    light: bool = False
    """Build it without attention: much smaller, but it ignores the prompt."""


RECIPES: tuple[type[TrainOptions], ...] = (LoraOptions, TextualInversionOptions, ControlNetOptions)


def checked(kind: type[TrainOptions], given: dict[str, Any]) -> TrainOptions:
    """Check options given on the command line.

    Raises:
        SettingsError: names the option, its value and the remedy.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise SettingsError(f"{option}={first['input']!r}: {first['msg']}; correct the option") from None
