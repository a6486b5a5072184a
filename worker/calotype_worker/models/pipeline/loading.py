"""Loads pipelines of any class that diffusers has, from safetensors alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError

_INDEX, _MODULAR_INDEX = "model_index.json", "modular_model_index.json"
_MISSING_PACKAGE = re.compile(r"requires the (\w+) library|No module named '(\w+)'")
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


def is_modular(class_name: str) -> bool:
    """Whether it is a class of modular blocks, which loads its parts itself."""
    import diffusers  # noqa: PLC0415 - takes seconds

    return issubclass(getattr(diffusers, class_name), diffusers.ModularPipeline)


def names_part(folder: Path, part: str) -> bool:
    """Whether a folder's index has this part."""
    index = folder / _INDEX
    return index.is_file() and json.loads(index.read_text()).get(part, [None])[0] is not None


def load_pipeline(
    name: str,
    location: str,
    *,
    class_name: str | None,
    dtype: torch.dtype,
    left_out: Sequence[str] = (),
    further: Mapping[str, Any] | None = None,
) -> Any:
    """The pipeline on the CPU, without safety checker and the parts that are `left_out`, with `further` parts.

    Raises:
        ModelLoadError: its parts could not be loaded.
    """
    import diffusers  # noqa: PLC0415 - takes seconds

    folder = Path(location)
    kind = getattr(diffusers, class_name) if class_name else diffusers.DiffusionPipeline
    try:
        if issubclass(kind, diffusers.ModularPipeline):
            return _with_components(kind(pretrained_model_name_or_path=location), dtype)
        if class_name is None and _is_modular(location):
            return _with_components(diffusers.ModularPipeline.from_pretrained(location, trust_remote_code=False), dtype)
        parts = {**_left_out(folder, left_out), **(further or {})}
        return kind.from_pretrained(location, torch_dtype=dtype, use_safetensors=True, **parts)
    except Exception as error:
        # from_pretrained raises almost anything for a broken folder: OSError, KeyError, safetensors' own errors.
        raise ModelLoadError(f"model {name!r}: {location!r} could not be loaded: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """What went wrong and what to do about it, in one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    package = _MISSING_PACKAGE.search(reason) if isinstance(error, ImportError) else None
    if package is not None:
        name = (package[1] or package[2]).lower()
        return f"it needs the package {name}, which is not installed; install it where the worker runs"
    return f"{reason}; check that the folder or hub id is a complete diffusers pipeline with safetensors weights"


def _is_modular(location: str) -> bool:
    """Whether a folder or hub id has an index of modular blocks and none of a pipeline class."""
    import diffusers  # noqa: PLC0415 - takes seconds

    if Path(location).is_dir():
        return (Path(location) / _MODULAR_INDEX).is_file() and not (Path(location) / _INDEX).is_file()
    try:
        diffusers.DiffusionPipeline.load_config(location)
    except OSError:
        return True
    return False


def _with_components(pipeline: Any, dtype: torch.dtype) -> Any:
    """The modular pipeline with its parts loaded. Those for which its index has no source stay absent.

    Raises:
        Exception: a part could not be loaded.
    """
    options = {"torch_dtype": dtype, "use_safetensors": True}
    pipeline.load_components(**options)
    for part in set(pipeline.null_component_names) & set(pipeline.pretrained_component_names):
        spec = pipeline.get_component_spec(part)
        if spec.pretrained_model_name_or_path:
            spec.load(**options)  # raises the error, which `load_components` only logs
    return pipeline


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
