"""Textual inversions (Gal et al. 2022): new tokens of a pipeline's text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from calotype_shared.errors import ModelLoadError

# The names of vectors in files for SDXL, and the parts that get them.
_BOTH = {"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")}


def load_embeddings(pipeline: Any, files: Mapping[str, Path]) -> None:
    """Add the tokens to a pipeline's tokenizers and text encoders, by token and file.

    Raises:
        ModelLoadError: the pipeline takes none, or a file is not a safetensors textual inversion for this model.
    """
    both = type(getattr(pipeline, "text_encoder_2", None)).__name__ == "CLIPTextModelWithProjection"
    holds = "the vectors clip_l and clip_g" if both else "{token: vectors}"
    for token, path in files.items():
        try:
            if both:
                _load_both(pipeline, token, path)
            else:
                pipeline.load_textual_inversion(str(path), token=token, use_safetensors=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelLoadError(
                f"textual inversion {token!r}: {path.name!r} could not be loaded: {reason}; give a safetensors file "
                f"of {holds} trained for this model"
            ) from error


def _load_both(pipeline: Any, token: str, path: Path) -> None:
    vectors = load_file(path)
    for key, (tokenizer, encoder) in _BOTH.items():
        if getattr(pipeline, encoder) is not None:  # a refiner has only the second
            pipeline.load_textual_inversion(
                vectors[key],
                token=token,
                tokenizer=getattr(pipeline, tokenizer),
                text_encoder=getattr(pipeline, encoder),
            )
