"""`Layout`: which files of a diffusers folder are a model's: its parts, and the variant of each part's weights.

It needs only the names of the files and the small JSON files, so that it serves hub repositories before a download.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
LEFT_OUT = frozenset({"safety_checker"})  # parts that are never loaded
_BASE = r"(?:diffusion_pytorch_model|model)"
_WEIGHTS = re.compile(rf"^{_BASE}(?:\.(?P<variant>\w+))?\.safetensors$")
_SHARDED = re.compile(rf"^{_BASE}\.safetensors\.index(?:\.(?P<variant>\w+))?\.json$")
_SMALL = (".json", ".txt", ".model", ".jinja")
_USUAL_VARIANTS = ("fp16", "bf16", "fp32")  # the first that is there


@dataclass(frozen=True, kw_only=True)
class Part:
    """A sub-folder that the index names. `kind` is None for a class of the pipeline's own module that is not found."""

    name: str
    library: str
    class_name: str
    variant: str | None
    weights: tuple[str, ...]  # paths in the folder; empty for tokenizers, schedulers and the like

    @property
    def kind(self) -> Any:
        return class_of_part(self.library, self.class_name)


@dataclass(frozen=True, kw_only=True)
class Layout:
    folder: Path
    class_name: str
    parts: tuple[Part, ...]
    files: tuple[str, ...]  # all that is loaded: weights, configs, tokenizers; paths in the folder


def class_of_part(library: str, class_name: str) -> Any:
    """The class that an index names, in diffusers, transformers or a pipeline's own module; None: there is none."""
    for module in (library, f"diffusers.pipelines.{library}"):
        if module.partition(".")[0] in ("diffusers", "transformers"):
            try:
                return getattr(importlib.import_module(module), class_name, None)
            except ImportError:
                continue
    return None


def names_in(folder: Path) -> frozenset[str]:
    """The files of a folder and of its sub-folders, one level deep, as paths with `/`."""
    return frozenset(
        path.relative_to(folder).as_posix()
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.is_file()
    )


def is_small(name: str) -> bool:
    """Whether a file is a config or belongs to a tokenizer."""
    return name.endswith(_SMALL)


def read_index(name: str, folder: Path) -> dict[str, Any]:
    """A folder's `model_index.json`.

    Raises:
        ModelLoadError: it is missing, or is not a JSON object with a `_class_name`.
    """
    file = folder / INDEX
    try:
        found = json.loads(file.read_text())
        if not isinstance(found["_class_name"], str):
            raise TypeError("_class_name")
        return dict(found)
    except OSError as error:
        raise ModelLoadError(
            f"model {name!r}: {str(folder)!r} has no {INDEX}; give the folder of a whole diffusers pipeline"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"model {name!r}: {str(file)!r} is not readable as JSON with a _class_name") from error


def _has_default(pipeline_class: Any, part_name: str) -> bool:
    """Whether a pipeline class makes the part itself where a folder has none, as LongCat does its scheduler."""
    import diffusers  # noqa: PLC0415 - takes seconds

    kind = getattr(diffusers, str(pipeline_class), None)
    parameter = inspect.signature(kind).parameters.get(part_name) if isinstance(kind, type) else None
    return parameter is not None and parameter.default is not inspect.Parameter.empty


def read_layout(
    name: str,
    folder: Path,
    *,
    variant: str | None = None,
    left_out: Collection[str] = (),
    names: Collection[str] | None = None,
) -> Layout:
    """What to load of a folder whose files have these names; by default, those that are there.

    A part's weights are those of `variant` if it has them, else those without one, else the variant that it has.

    Raises:
        ModelLoadError: the index is broken, a part or its weights are missing, or they are pickles.
    """
    index = read_index(name, folder)
    names = names_in(folder) if names is None else names
    parts, files = [], [INDEX]
    for part_name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)):
            continue
        if part_name in LEFT_OUT or part_name in left_out:
            continue
        library, class_name = value
        own = sorted(path.removeprefix(f"{part_name}/") for path in names if path.startswith(f"{part_name}/"))
        if not own and _has_default(index.get("_class_name"), part_name):
            continue
        if not own:
            raise ModelLoadError(
                f"model {name!r}: {INDEX} names the part {part_name!r}, and there is no {part_name}/; download the "
                "whole pipeline again"
            )
        kind = class_of_part(library, class_name)
        chosen: str | None = None
        weights: tuple[str, ...] = ()
        if kind is None and library in ("diffusers", "transformers"):
            version = importlib.import_module(library).__version__
            raise ModelLoadError(
                f"model {name!r}: {INDEX}: class {class_name!r} of {part_name}/ is not in {library} {version}; use a "
                f"newer {library}, or another model"
            )
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            chosen, weights = weights_of(f"model {name!r}", folder, part_name, own, wanted=variant)
        parts.append(Part(name=part_name, library=library, class_name=class_name, variant=chosen, weights=weights))
        files += weights
        files += [f"{part_name}/{path}" for path in own if is_small(path)]
    return Layout(
        folder=folder,
        class_name=index["_class_name"],
        parts=tuple(parts),
        files=tuple(dict.fromkeys(files)),
    )


def weights_of(
    what: str, folder: Path, part: str, own: Collection[str], *, wanted: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """The variant of a part and the paths of its weights in the folder; the part is "" for the folder itself.

    `own` are the names of the part's files, and `what` begins the messages.

    Raises:
        ModelLoadError: there are no whole weights in safetensors.
    """
    place = f"{part}/" if part else ""
    found: dict[str | None, str] = {}
    for pattern in (_WEIGHTS, _SHARDED):  # an index wins over a whole file, as in diffusers
        found |= {match["variant"]: path for path in own if (match := pattern.match(path))}
    if not found:
        raise ModelLoadError(f"{what}: {place or 'it'} should hold safetensors weights but holds {_instead(own)}")
    chosen = next(v for v in (wanted, None, *_USUAL_VARIANTS, *sorted(filter(None, found))) if v in found)
    path = found[chosen]
    if _WEIGHTS.match(path):
        return chosen, (f"{place}{path}",)
    index = folder / part / path
    try:
        shards = sorted({str(shard) for shard in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"{what}: {str(index)!r} is not the index of a sharded model; download it again"
        ) from error
    missing = [shard for shard in shards if shard not in own]
    if missing:
        raise ModelLoadError(
            f"{what}: {place or 'it'} lacks {', '.join(missing[:3])}, which {path} names; download it again"
        )
    return chosen, tuple(f"{place}{shard}" for shard in shards)


def read_config(what: str, file: Path) -> dict[str, Any]:
    """A part's `config.json`. Raises ModelLoadError if it is missing or is not a JSON object."""
    try:
        return dict(json.loads(file.read_text()))
    except OSError as error:
        raise ModelLoadError(f"{what}: {str(file)!r} cannot be read: {error}; give a whole diffusers folder") from error
    except (ValueError, TypeError) as error:
        raise ModelLoadError(f"{what}: {str(file)!r} is not a JSON object; download it again") from error


def _instead(own: Collection[str]) -> str:
    if any(path.endswith(".safetensors") for path in own):
        files = ", ".join([path for path in own if path.endswith(".safetensors")][:2])
        return f"only {files}, which are no whole file and have no index; download the whole part again"
    if any(path.endswith((".bin", ".ckpt", ".pt")) for path in own):
        return (
            "only a pickle, which Calotype never opens; convert it with diffusers' "
            "save_pretrained(..., safe_serialization=True)"
        )
    return "none; download or save the whole pipeline again"
