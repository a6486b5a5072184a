"""Checks that tokenizers fit their text encoders: else prompts would be read wrongly, or not at all."""

from __future__ import annotations

import logging
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError

log = logging.getLogger(__name__)

_LEAST_TOKENS = 16  # besides special ones, which are all that a tokenizer without its files has
_USUAL_SHARE = 0.9  # of the encoder's embeddings: encoders round their vocabulary up by at most a percent
_OLD_CLIP_END = 2  # an end token in old CLIP configs, which transformers replaces by the highest id
_FILES = "vocab.json and merges.txt, or tokenizer.json, or spiece.model"


def check_text(name: str, pipeline: Any, *, required: bool = True) -> None:
    """Check each tokenizer of a pipeline against its text encoder, and set a missing maximum length.

    `required`: an encoder without a tokenizer is an error.

    Raises:
        ModelLoadError: a tokenizer is missing, or it has another vocabulary or length than its encoder.
    """
    components = getattr(pipeline, "components", {})
    for encoder_name, encoder in components.items():
        if not encoder_name.startswith("text_encoder") or not isinstance(encoder, torch.nn.Module):
            continue
        tokenizer_name = encoder_name.replace("text_encoder", "tokenizer")
        tokenizer = components.get(tokenizer_name)
        if tokenizer is None:
            if required:
                raise ModelLoadError(
                    f"model {name!r}: it has a {encoder_name}/, but no {tokenizer_name}/; complete the folder"
                )
            continue
        if hasattr(tokenizer, "get_vocab") and hasattr(encoder, "get_input_embeddings"):
            _check_vocabulary(f"model {name!r}: {tokenizer_name}/", tokenizer, f"{encoder_name}/", encoder)
            _check_length(f"model {name!r}: {tokenizer_name}/", tokenizer, f"{encoder_name}/", encoder)


def _check_vocabulary(what: str, tokenizer: Any, encoder_name: str, encoder: Any) -> None:
    try:
        embeddings = getattr(encoder.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # of encoders that are diffusers' own classes, such as Kandinsky's
        return
    if embeddings is None:
        return
    ids = set(tokenizer.get_vocab().values())
    size, highest = len(ids), max(ids, default=-1)
    if size < _USUAL_SHARE * embeddings:
        log.warning("few tokens", extra={"tokenizer": what, "tokens": size, "embeddings": embeddings})
    if len(ids - set(tokenizer.all_special_ids)) < _LEAST_TOKENS or highest >= embeddings:
        raise ModelLoadError(
            f"{what} has {size} tokens with ids up to {highest}, and {encoder_name} reads {embeddings}; use the "
            f"tokenizer of this text encoder, with all of its files ({_FILES})"
        )
    end = getattr(encoder.config, "eos_token_id", None)
    if (
        getattr(encoder.config, "model_type", "") == "clip_text_model"
        and end not in (None, _OLD_CLIP_END)
        and tokenizer.eos_token_id != end
    ):
        raise ModelLoadError(
            f"{what} ends a prompt with token {tokenizer.eos_token_id}, and {encoder_name} expects {end} "
            "(eos_token_id); use the tokenizer of this text encoder"
        )


def _check_length(what: str, tokenizer: Any, encoder_name: str, encoder: Any) -> None:
    """CLIP's positions are its longest prompt. A tokenizer that does not know its length claims 10^30 tokens."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if getattr(encoder.config, "model_type", "") != "clip_text_model" or positions is None:
        return
    if tokenizer.model_max_length > 10**9:
        tokenizer.model_max_length = positions
    if tokenizer.model_max_length > positions:
        raise ModelLoadError(
            f"{what} allows prompts of {tokenizer.model_max_length} tokens, and {encoder_name} reads {positions}; set "
            "model_max_length in its tokenizer_config.json"
        )
