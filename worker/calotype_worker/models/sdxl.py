"""Stable Diffusion XL, its refiner, and the few-step models distilled from it (Podell et al. 2023)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError
from calotype_shared.schema.enums import Feature
from calotype_worker.models.base import Conditioning, Text
from calotype_worker.models.clip_text import ClipText
from calotype_worker.models.embeddings import load_embeddings
from calotype_worker.models.latent import Adapters, Setup
from calotype_worker.models.unet import UNetModel
from calotype_worker.request import GenerationRequest

# Aesthetic scores of diffusers' refiner pipeline, positive and negative, on the scale of LAION's predictor.
_AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


class StableDiffusionXL(UNetModel):
    """A `StepModel` around the parts of an SDXL pipeline. A refiner has only the second text encoder."""

    @classmethod
    def features_of(cls, pipeline: Any, adapters: Adapters) -> frozenset[Feature]:
        features = super().features_of(pipeline, adapters)
        return features if pipeline.text_encoder is not None else features - {Feature.TEXT_TO_IMAGE}

    def __init__(self, pipeline: Any, setup: Setup) -> None:
        unet = pipeline.unet
        if unet.config.in_channels != pipeline.vae.config.latent_channels:
            raise ModelLoadError(
                f"model {setup.card.name!r}: its U-Net needs {unet.config.in_channels} input channels, which is not "
                "supported for SDXL; use a model without extra input channels, which inpaints by blending"
            )
        load_embeddings(pipeline, setup.adapters.embeddings)
        encoders = {
            name: getattr(pipeline, name)
            for name in ("text_encoder", "text_encoder_2")
            if getattr(pipeline, name) is not None
        }
        super().__init__(pipeline, setup, text_encoders=encoders)
        tokenizers = {"text_encoder": pipeline.tokenizer, "text_encoder_2": pipeline.tokenizer_2}
        self._texts = {
            name: ClipText(tokenizers[name], encoder, penultimate=True, device=setup.device)
            for name, encoder in encoders.items()
        }
        self._zero_negative = bool(pipeline.config.force_zeros_for_empty_prompt)
        self._aesthetic = bool(getattr(pipeline.config, "requires_aesthetics_score", False))

    def text_windows(self, field: str, prompt: str) -> int:
        return max(text.windows(field, prompt) for text in self._texts.values())

    @torch.inference_mode()
    def encode(self, texts: Sequence[Text]) -> Sequence[Conditioning]:
        """`text` (tokens, features of both encoders) and `pooled` (features of the second's projection)."""
        columns: list[list[torch.Tensor]] = []
        for name, text in self._texts.items():
            with self._using(name):
                columns.append(self._by_loras(texts, functools.partial(_encoded, text)))
        second = self._texts["text_encoder_2"]
        with self._using("text_encoder_2"):
            pooled = self._by_loras(
                texts, lambda own: [second.encoder(second.tokens(text.prompt))[0][0] for text in own]
            )
        found = []
        for text, own_pooled, *embedded in zip(texts, pooled, *columns, strict=True):
            own = {"text": torch.cat(embedded, dim=-1).to(self.dtype), "pooled": own_pooled.to(self.dtype)}
            if text.negative and not text.prompt and self._zero_negative:
                own = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
            found.append(own)
        return found

    def row_inputs(self, request: GenerationRequest, *, negative: bool) -> Conditioning:
        """`time_ids`: original size, crop and target size, or the refiner's aesthetic score; and embedded guidance."""
        size = [float(request.height), float(request.width)]
        score = _NEGATIVE_AESTHETIC_SCORE if negative else _AESTHETIC_SCORE
        time_ids = torch.tensor([*size, 0.0, 0.0, *([score] if self._aesthetic else size)])
        return {"time_ids": time_ids, **super().row_inputs(request, negative=negative)}

    def _added(self, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        return {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"].to(self.dtype)}


def _encoded(encoder: ClipText, texts: Sequence[Text]) -> list[torch.Tensor]:
    return encoder.encode_all([(text.prompt, text.windows) for text in texts])
