"""`StepModel`: what the engine needs of a model family. Everything family-specific stays behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from calotype_shared.model_card import ModelCard


class StepModel(Protocol):
    """A latent diffusion model that can be called one denoising step at a time. Called by the engine's thread only.

    Rows of one call need to share nothing but the latent shape: each has its own timestep and conditioning.
    """

    card: ModelCard
    device: torch.device
    dtype: torch.dtype
    scheduler_config: Mapping[str, Any]  # of the model's own scheduler, after its pipeline's constructor

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) for a picture of that size in pixels."""
        ...

    def check_prompt(self, field: str, prompt: str) -> None:
        """Raise InvalidRequest if the text encoder cannot take the whole prompt. May be called from any thread."""
        ...

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Conditioning of each prompt: (len(prompts), tokens, features), on the device, in the network's dtype."""
        ...

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """One forward pass: latents (R, C, h, w) already scaled, timesteps (R,), conditioning (R, tokens, features).

        Returns the raw model output, (R, C, h, w) float32.
        """
        ...

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Pictures of finished latents (B, C, h, w) float32: uint8 (B, H, W, 3)."""
        ...
