"""Stable Diffusion 1.x and 2.x: CLIP text encoder, U-Net, KL autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

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

_LATENT_CHANNELS = 4
_INPAINTING_CHANNELS = 9  # latents, mask, and the latents of the masked image


class StableDiffusion(UNetModel):
    """A `StepModel` around the parts of a `StableDiffusionPipeline` that was loaded in `dtype`.

    Epsilon and v-prediction differ only in the scheduler's config, so one class serves both. It also
    serves U-Nets with 9 input channels (for inpainting) and those with the guidance scale as an input (LCM).
    """

    @classmethod
    def features_of(cls, pipeline: Any, adapters: Adapters) -> frozenset[Feature]:
        features = super().features_of(pipeline, adapters)
        if pipeline.unet.config.in_channels == _INPAINTING_CHANNELS:
            features -= {Feature.TEXT_TO_IMAGE, Feature.IMAGE_TO_IMAGE}
        return features

    def __init__(self, pipeline: Any, setup: Setup) -> None:
        unet = pipeline.unet
        _refuse_other_inputs(unet.config, setup.card.name)
        load_embeddings(pipeline, setup.adapters.embeddings)
        super().__init__(pipeline, setup, text_encoders={"text_encoder": pipeline.text_encoder})
        self._text = ClipText(pipeline.tokenizer, pipeline.text_encoder, device=setup.device)
        self.mask_channels = unet.config.in_channels - _LATENT_CHANNELS

    def text_windows(self, field: str, prompt: str) -> int:
        return self._text.windows(field, prompt)

    @torch.inference_mode()
    def encode(self, texts: Sequence[Text]) -> Sequence[Conditioning]:
        with self._using("text_encoder"):
            return [
                {"text": embedded.to(self.dtype)}
                for embedded in self._by_loras(
                    texts, lambda own: self._text.encode_all([(text.prompt, text.windows) for text in own])
                )
            ]


def _refuse_other_inputs(config: Any, name: str) -> None:
    """Refuse a U-Net that needs inputs not provided here: it would run, but generate wrong images."""
    wants = {
        f"{config.in_channels} input channels": config.in_channels not in (_LATENT_CHANNELS, _INPAINTING_CHANNELS),
        f"class labels ({config.class_embed_type})": config.class_embed_type is not None,
        f"added conditioning ({config.addition_embed_type})": config.addition_embed_type is not None,
    }
    for what, wanted in wants.items():
        if wanted:
            raise ModelLoadError(
                f"model {name!r}: its U-Net needs {what}, which is not supported; "
                "use a Stable Diffusion 1.x or 2.x model"
            )
