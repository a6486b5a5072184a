"""Textual inversion (Gal et al. 2022): learns a new word as one or more token embeddings, and changes nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from calotype_shared.errors import InvalidRequest
from calotype_train.data import Batch
from calotype_train.pipeline import BaseModel, Shot


class TextualInversionRecipe:
    """The new rows of the embedding table are one parameter of their own, put in by a hook: the table stays frozen."""

    name = "textual-inversion"

    def __init__(self, model: BaseModel, *, token: str, initialize_from: str, vectors: int = 1) -> None:
        """`token` is the new word, initialized from `initialize_from`, with `vectors` vectors.

        Raises:
            InvalidRequest: the token already exists, or `initialize_from` is not one token.
        """
        self.model = model
        self.token, self._word, self._vectors = token, initialize_from, vectors
        tokenizer, encoder = model.tokenizer, model.text_encoder
        if token in tokenizer.get_vocab() or any(character.isspace() for character in token) or not token:
            raise InvalidRequest(
                "is not a new word",
                field="--token",
                value=token,
                remedy='choose one without spaces that the tokenizer does not know, such as "<my-thing>"',
            )
        known = tokenizer(initialize_from, add_special_tokens=False).input_ids
        if len(known) != 1:
            raise InvalidRequest(
                f"is {len(known)} tokens for this model, not a single known word",
                field="--initialize-from",
                value=initialize_from,
                remedy="give a word of the captions that is close in meaning to the new one",
            )
        # diffusers' names for the vectors of one word: <x>, <x>_1, <x>_2 …
        tokenizer.add_tokens([token, *(f"{token}_{number}" for number in range(1, vectors))])
        self._first = int(tokenizer.convert_tokens_to_ids(token))
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings()
        table.requires_grad_(False)
        self._start = table.weight[known[0]].detach().clone().repeat(vectors, 1)  # (vectors, features)
        self.vectors = torch.nn.Parameter(self._start.clone())
        self.parameters: Mapping[str, torch.nn.Parameter] = {"vectors": self.vectors}
        self._shown = self.vectors
        table.register_forward_hook(self._put_in)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"token": self.token, "initialize_from": self._word, "vectors": self._vectors}

    def expand(self, caption: str) -> str:
        """The caption with every vector's own token, as diffusers' `maybe_convert_prompt` writes it."""
        every = [self.token, *(f"{self.token}_{number}" for number in range(1, self._vectors))]
        return caption.replace(self.token, " ".join(every))

    def predict(self, batch: Batch, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        ids = self.model.token_ids([self.expand(caption) for caption in batch.captions])
        text = self.model.text_encoder(ids)[0]  # through the encoder every time, because its input is trained
        predicted: torch.Tensor = self.model.unet(noised, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        return predicted

    def images(self, shots: Sequence[Shot], *, trained: bool) -> list[Image.Image]:
        """Without training: with the word from which the new one was initialized."""
        self._shown = self.vectors if trained else self._start
        try:
            return self.model.images(shots)
        finally:
            self._shown = self.vectors

    def save(self, path: Path) -> None:
        """{token: (vectors, features)} for `pipeline.load_textual_inversion`."""
        save_file({self.token: self.vectors.detach().cpu().contiguous()}, path)
        path.chmod(0o644)  # safetensors writes for the owner alone

    def _put_in(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        place = inputs[0] - self._first  # (B, tokens)
        own = (place >= 0) & (place < self._vectors)
        learned = self._shown.to(output)[place.clamp(0, self._vectors - 1)]
        return torch.where(own[..., None], learned, output)


def check_captions(captions: Sequence[str], token: str) -> None:
    """Check that the new word can be learned from these captions.

    Raises:
        InvalidRequest: no caption contains the new word.
    """
    if not any(token in caption for caption in captions):
        raise InvalidRequest(
            "does not occur in any caption",
            field="--token",
            value=token,
            remedy=f'use it in the captions, for example "a {token} on a white background"',
        )
