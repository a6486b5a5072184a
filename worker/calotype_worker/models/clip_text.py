"""`ClipText`: a CLIP text encoder that reads weighted prompts of any length.

Weights and long prompts are compel's (https://github.com/damian0815/compel): it scales a token's distance from the
empty prompt, blends fragments below 1 with the prompt that lacks them, and splits long prompts at sentences into
windows. Only its embedding provider is used, on fragments from `calotype_shared.schema.prompt`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode
from diffusers.loaders import TextualInversionLoaderMixin

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.prompt import parse_weights

MAX_WINDOWS = 8


class ClipText:
    """One tokenizer and its encoder. `penultimate` selects the hidden states that SDXL is trained on.

    `device` is where the encoder computes, which an offloaded encoder does not report.
    """

    def __init__(
        self, tokenizer: Any, encoder: Any, *, penultimate: bool = False, device: torch.device | None = None
    ) -> None:
        self.encoder = encoder
        self._device: torch.device = device or encoder.device
        self._penultimate = penultimate
        # A fast tokenizer keeps truncation as state and does not allow two threads ("Already borrowed"): so one
        # for the engine's thread, one for the others.
        self._tokenizer = tokenizer
        self._shared_tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        for own in (self._tokenizer, self._shared_tokenizer):
            # Longer prompts are valid, so no warning about them.
            own.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True

    @property
    def window_tokens(self) -> int:
        return int(self._tokenizer.model_max_length)

    def windows(self, field: str, prompt: str) -> int:
        """The number of windows of a prompt. Thread-safe.

        Raises:
            InvalidRequest: a weight out of range, or more than `MAX_WINDOWS`.
        """
        with self._lock:
            fragments = _fragments(prompt, self._shared_tokenizer, field)
            tokens, _, _ = self._provider(self._shared_tokenizer).get_token_ids_and_expand_weights(
                *_columns(fragments), device="cpu"
            )
        windows = len(tokens) // self.window_tokens
        if windows > MAX_WINDOWS:
            raise InvalidRequest(
                f"needs {windows} windows of {self.window_tokens} tokens",
                field=field,
                value=prompt,
                remedy=f"shorten it to {MAX_WINDOWS} windows, about {MAX_WINDOWS * (self.window_tokens - 2)} tokens",
            )
        return windows

    def encode_all(self, prompts: Sequence[tuple[str, int]]) -> list[torch.Tensor]:
        """`encode` of each prompt and number of windows; plain short prompts go through the encoder together."""
        plain = {}
        for prompt, windows in dict.fromkeys(prompts):
            fragments = _fragments(prompt, self._tokenizer, "prompt")
            if windows == 1 and all(weight == 1.0 for _, weight in fragments):
                plain[prompt, windows] = self.tokens(prompt)
        found: dict[tuple[str, int], torch.Tensor] = {}
        if plain:
            output = self.encoder(torch.cat(list(plain.values())), output_hidden_states=self._penultimate)
            embedded = output.hidden_states[-2] if self._penultimate else output.last_hidden_state
            # Rows of one result are views of it. Clones can be freed one by one when they leave a cache.
            found = {key: own.clone() for key, own in zip(plain, embedded, strict=True)}
        return [found[key] if key in found else self.encode(*key) for key in prompts]

    def encode(self, prompt: str, windows: int = 1) -> torch.Tensor:
        """Embeddings (windows · window_tokens, features) in the encoder's dtype; empty windows follow a short prompt.

        The engine's thread.
        """
        provider = self._provider(self._tokenizer)
        fragments = _fragments(prompt, self._tokenizer, "prompt")
        texts, weights = _columns(fragments)
        embedded = provider.get_embeddings_for_weighted_prompt_fragments([texts], [weights], device=self._device)[0]
        missing = windows - len(embedded) // self.window_tokens
        if missing > 0:
            embedded = torch.cat([embedded, *[provider.empty_z[0].to(embedded)] * missing])
        return embedded

    def tokens(self, prompt: str) -> torch.Tensor:
        """Token ids of one truncated window, without weights: (1, window_tokens). Engine's thread only."""
        text = "".join(text for text, _ in _fragments(prompt, self._tokenizer, "prompt"))
        found = self._tokenizer(
            [text], padding="max_length", max_length=self.window_tokens, truncation=True, return_tensors="pt"
        )
        ids: torch.Tensor = found.input_ids
        return ids.to(self._device)

    def _provider(self, tokenizer: Any) -> EmbeddingsProvider:
        # Created for each call, because it caches the empty prompt's embedding, which a LoRA changes.
        return EmbeddingsProvider(
            tokenizer=tokenizer,
            text_encoder=_Placed(self.encoder, self._device),
            truncate=False,
            split_long_text_mode=SplitLongTextMode.SENTENCES,
            dtype_for_device_getter=lambda _: self.encoder.dtype,
            returned_embeddings_type=(
                ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
                if self._penultimate
                else ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
            ),
        )


class _Placed:
    """An encoder for compel, which reads its device to place tensors there."""

    def __init__(self, encoder: Any, device: torch.device) -> None:
        self._encoder = encoder
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._encoder(*inputs, **options)


def _fragments(prompt: str, tokenizer: Any, field: str) -> list[tuple[str, float]]:
    """Weighted fragments, with textual inversions of several vectors spelled out; one empty one for no text."""
    spelled = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    found = [(text, weight) for text, weight in parse_weights(spelled, field=field) if text.strip()]
    return found or [("", 1.0)]


def _columns(fragments: list[tuple[str, float]]) -> tuple[list[str], list[float]]:
    return [text for text, _ in fragments], [weight for _, weight in fragments]
