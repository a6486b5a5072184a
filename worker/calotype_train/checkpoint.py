"""Checkpoints of a training run: tensors in safetensors, other values in JSON, nothing pickled.

The JSON file is written last and by rename: a checkpoint without one never finished and is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_KEPT = 2


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write `step-N.safetensors` and `step-N.json`; keep the newest of the older ones, in case this one is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.safetensors"
    scratch = path.with_suffix(".new")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch)
    scratch.replace(path)
    scratch.write_text(json.dumps({"step": step, **facts}, indent=2) + "\n")
    scratch.replace(path.with_suffix(".json"))
    for old in _finished(folder)[:-_KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest complete checkpoint's tensors and values, or None."""
    finished = _finished(folder)
    if not finished:
        return None
    facts = json.loads(finished[-1].read_text())
    return load_file(finished[-1].with_suffix(".safetensors")), facts


def _finished(folder: Path) -> list[Path]:
    """The JSON files of whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*.json") if path.with_suffix(".safetensors").exists())
