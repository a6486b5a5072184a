"""Stable Diffusion 1.x and 2.x: CLIP text encoder, U-Net, KL autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_shared.model_card import ModelCard


class StableDiffusion:
    """A `StepModel` around the parts of a `StableDiffusionPipeline` that was loaded in `dtype`.

    Epsilon and v-prediction differ only in the scheduler's config, so one class serves both.
    """

    def __init__(self, pipeline: Any, *, card: ModelCard, device: torch.device, dtype: torch.dtype) -> None:
        _refuse_other_inputs(pipeline.unet.config, card.name)
        self.card = card
        self.device = device
        self.dtype = dtype
        self.scheduler_config: Mapping[str, Any] = dict(pipeline.scheduler.config)
        self._tokenizer = pipeline.tokenizer
        # A fast tokenizer keeps its truncation as state and refuses two threads at once ("Already borrowed").
        self._tokenizer_lock = threading.Lock()
        self._text_encoder = pipeline.text_encoder.to(device).eval()
        self._unet = pipeline.unet.to(device).to(memory_format=torch.channels_last).eval()
        self._vae = pipeline.vae.to(device).eval()
        self._vae_factor = 2 ** (len(self._vae.config.block_out_channels) - 1)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self._unet.config.in_channels, height // self._vae_factor, width // self._vae_factor

    def check_prompt(self, field: str, prompt: str) -> None:
        limit = self._tokenizer.model_max_length
        with self._tokenizer_lock:
            tokens = len(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if tokens > limit:
            raise InvalidRequest(
                f"is {tokens} tokens long, and model {self.card.name!r} reads at most {limit} with its two markers",
                field=field,
                value=prompt,
                remedy=f"shorten it by {tokens - limit} tokens",
            )

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        with self._tokenizer_lock:
            tokens = self._tokenizer(
                list(prompts),
                padding="max_length",
                max_length=self._tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
        # Most CLIP encoders attend to padding; the few that do not say so in their config.
        uses_mask = getattr(self._text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if uses_mask else None
        return self._text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0].to(self.dtype)

    @torch.inference_mode()
    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        rows = latents.to(self.dtype, memory_format=torch.channels_last)
        return self._unet(rows, timesteps, encoder_hidden_states=conditioning, return_dict=False)[0].float()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        scaled = (latents / self._vae.config.scaling_factor).to(self.dtype)
        pixels = self._vae.decode(scaled, return_dict=False)[0].float()  # (B, 3, H, W) in -1..1
        return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _refuse_other_inputs(config: Any, name: str) -> None:
    """A U-Net that wants more than latents, a timestep and text would run and give wrong pictures: refuse it."""
    latent_channels = 4
    wants = {
        f"{config.in_channels} input channels": config.in_channels != latent_channels,
        "a guidance embedding (time_cond_proj_dim)": config.time_cond_proj_dim is not None,
        f"class labels ({config.class_embed_type})": config.class_embed_type is not None,
        f"added conditioning ({config.addition_embed_type})": config.addition_embed_type is not None,
    }
    for what, wanted in wants.items():
        if wanted:
            raise ModelLoadError(
                f"model {name!r}: its U-Net wants {what}, which this version cannot give it; "
                "use a text-to-image Stable Diffusion 1.x or 2.x model"
            )
