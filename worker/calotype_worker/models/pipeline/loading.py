"""Loads pipelines of any class that diffusers has, from safetensors alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError

_INDEX, _MODULAR_INDEX = "model_index.json", "modular_model_index.json"
_CLASS_AND_SOURCE = re.compile(r"^([A-Z][A-Za-z0-9]*Pipeline):(.+)$")


def split_source(source: str) -> tuple[str | None, str]:
    """Split `CLASS:FOLDER`; the class is None if the folder's own is used."""
    found = _CLASS_AND_SOURCE.match(source)
    return (found[1], found[2]) if found else (None, source)


def class_of(name: str, folder: Path) -> str:
    """The pipeline class that a folder's index names.

    Raises:
        ModelLoadError: the index is missing or broken, or does not name a class of diffusers.
    """
    index = next((folder / file for file in (_INDEX, _MODULAR_INDEX) if (folder / file).is_file()), None)
    if index is None:
        raise ModelLoadError(
            f"model {name!r}: {str(folder)!r} has no {_INDEX}; give the folder of a whole diffusers pipeline"
        )
    try:
        found = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"model {name!r}: {str(index)!r} is not readable as JSON with a _class_name") from error
    check_class(name, found)
    return str(found)


def check_class(name: str, class_name: Any) -> None:
    """Raises ModelLoadError if it is not a pipeline class of diffusers. A repository's code never runs."""
    import diffusers  # noqa: PLC0415 - takes seconds

    kind = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    bases = diffusers.DiffusionPipeline, diffusers.ModularPipeline
    if not (isinstance(kind, type) and issubclass(kind, bases)):
        raise ModelLoadError(
            f"model {name!r}: pipeline class {class_name!r} is not in diffusers {diffusers.__version__}, "
            "and code that comes with a model is never run; use a model whose class is there, or a newer diffusers"
        )


def load_pipeline(
    name: str,
    location: str,
    *,
    class_name: str | None,
    dtype: torch.dtype,
    left_out: Sequence[str] = (),
    given: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The pipeline on the CPU, without safety checker and the parts that are `left_out`; `given` parts are loaded.

    Raises:
        ModelLoadError: its parts could not be loaded.
    """
    import diffusers  # noqa: PLC0415 - takes seconds

    folder = Path(location)
    try:
        if (folder / _MODULAR_INDEX).is_file() and not (folder / _INDEX).is_file():
            made = diffusers.ModularPipeline.from_pretrained(location)
            made.load_components(torch_dtype=dtype, use_safetensors=True)
            missing = [part for part in made.null_component_names if part in made.pretrained_component_names]
            if missing:
                raise ValueError(f"{', '.join(missing)} could not be loaded")
            return made
        kind = getattr(diffusers, class_name) if class_name else diffusers.DiffusionPipeline
        return kind.from_pretrained(
            location, torch_dtype=dtype, use_safetensors=True, **_left_out(folder, left_out), **given
        )
    except Exception as error:
        # from_pretrained raises almost anything for a broken folder: OSError, KeyError, safetensors' own errors.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"model {name!r}: {location!r} could not be loaded: {reason}; "
            "check that the folder or hub id is a complete diffusers pipeline with safetensors weights"
        ) from error


def _left_out(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Parts that are excluded, and those that the folder declares as absent, which diffusers wants repeated."""
    index = folder / _INDEX
    if not index.is_file():
        return {}
    parts = json.loads(index.read_text())
    unwanted = {*names, "safety_checker"}
    found: dict[str, Any] = {part: None for part, kind in parts.items() if kind == [None, None] or part in unwanted}
    if "requires_safety_checker" in parts:
        found["requires_safety_checker"] = False
    return found
