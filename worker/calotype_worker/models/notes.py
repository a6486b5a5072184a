"""`Notes`: an operator's settings for a model, from `calotype.json` in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calotype_shared.errors import ModelLoadError, shown
from calotype_shared.schema.model_card import ModelCard

NAME = "calotype.json"
Side = Annotated[int, Field(ge=8, le=16_384)]


class Recommended(BaseModel):
    """Settings of sample sheets during training; jobs get the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    sampler: str | None = None


class Notes(BaseModel):
    """What the card says instead of what the model's own files say."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    native_sizes: Annotated[tuple[tuple[Side, Side], ...], Field(min_length=1)] | None = None
    """(width, height) in pixels, the default first."""
    max_pixels: Annotated[int, Field(ge=64)] | None = None
    description: str = ""
    default_sampler: str | None = None
    default_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    default_guidance: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    recommended: Recommended | None = None
    # Records of how a model was made, which are not read: the bundled model's.
    training: Mapping[str, Any] | None = None
    vae: Mapping[str, Any] | None = None
    score: Mapping[str, Any] | None = None

    def applied(self, card: ModelCard, *, name: str) -> ModelCard:
        """The card with these defaults.

        Raises:
            ModelLoadError: the model does not have the sampler.
        """
        if self.default_sampler is not None and self.default_sampler not in card.samplers:
            raise ModelLoadError(
                f"model {name!r}: {NAME}: default_sampler={self.default_sampler!r} is not a sampler of this model; use "
                f"one of: {', '.join(card.samplers)}"
            )
        names = ("default_sampler", "default_steps", "default_guidance")
        return card.model_copy(update={key: value for key in names if (value := getattr(self, key)) is not None})


def read_notes(name: str, source: Path) -> Notes:
    """The notes in a model's folder, or in the one beside a checkpoint file; empty if there are none.

    Raises:
        ModelLoadError: the file is not JSON, or has an unknown key or a wrong value.
    """
    file = (source.with_suffix("") if source.is_file() else source) / NAME
    if not file.is_file():
        return Notes()
    try:
        return Notes.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Notes.model_fields)
        said = f"{where}={shown(first['input'])}: {first['msg']}" if where else first["msg"]
        raise ModelLoadError(
            f"model {name!r}: {str(file)!r} is not valid: {said}; correct it, or leave it out. Its keys: {known}"
        ) from error
    except OSError as error:
        raise ModelLoadError(f"model {name!r}: {str(file)!r} cannot be read: {error}; check its permissions") from error
