"""Loads the parts of a diffusers folder whole: a tensor that is missing, left over or of another shape is an error.

diffusers and transformers only warn, and fill what is missing with random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.folder import Layout
from calotype_worker.models.header import named, read_header

# Buffers of old versions, and the other halves of checkpoints of which a pipeline uses only the text encoder.
_HARMLESS = re.compile(r"(^|\.)position_ids$|^(vision_model|visual_projection|text_projection|logit_scale)\b")


def load_parts(name: str, layout: Layout, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The parts with weights, on the CPU in `dtype`.

    Raises:
        ModelLoadError: a file is broken, or its tensors are not exactly those of the part's config.
    """
    return {
        part.name: load_whole(
            f"model {name!r}", part.kind, layout.folder, part.weights, part=part.name, variant=part.variant, dtype=dtype
        )
        for part in layout.parts
        if part.weights
    }


def load_whole(
    what: str,
    kind: Any,
    folder: Path,
    weights: Sequence[str],
    *,
    dtype: torch.dtype,
    part: str = "",
    variant: str | None = None,
) -> Any:
    """A model of class `kind` from a part of a folder; `weights` are its files, for their headers and the messages.

    Raises:
        ModelLoadError: a file is broken, or its tensors are not exactly those of the config.
    """
    for file in weights:
        read_header(what, folder / file)
    where = weights[0] if len(weights) == 1 else f"{part}/"
    options: Mapping[str, Any] = {"torch_dtype": dtype}
    if kind.__module__.startswith("transformers."):
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}  # its error would not name them
    try:
        model, report = kind.from_pretrained(
            folder / part,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        # from_pretrained raises almost anything for a broken folder: OSError, KeyError, safetensors' own errors.
        raise ModelLoadError(
            f"{what}: {where} could not be loaded: {reason(error)}; download or save {part or 'it'} again"
        ) from error
    missing = sorted(report.get("missing_keys", ()))
    unexpected = sorted(key for key in report.get("unexpected_keys", ()) if not _HARMLESS.search(key))
    mismatched = sorted(
        f"{key} {tuple(given)} instead of {tuple(wanted)}" for key, given, wanted in report.get("mismatched_keys", ())
    )
    for problem, keys in (
        ("lacks", missing),
        ("holds tensors that its config has no place for:", unexpected),
        ("holds tensors of other shapes than its config's:", mismatched),
    ):
        if keys:
            raise ModelLoadError(
                f"{what}: {where} {problem} {named(keys)}; download {part or 'it'} again, config and weights of "
                "one model"
            )
    return model


def reason(error: Exception) -> str:
    """The first line of an error's message, with the next if it announces one; or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return f"{lines[0]} {lines[1][:200]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
