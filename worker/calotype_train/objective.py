"""The loss of every recipe: the mean squared error of the noise, or of v, at a random timestep."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch

from calotype_shared.errors import InvalidRequest

_NOISY_FLOOR = 0.15  # keeps the noisiest steps' weights finite; decision note 0004


class Weighting(StrEnum):
    """How a timestep's error is weighted by its signal-to-noise ratio; the mean weight is 1."""

    UNIFORM = "uniform"
    MIN_SNR = "min-snr"  # Hang et al. 2023, equation 5
    NOISY = "noisy"  # 1 / (sqrt(SNR) + 0.15): as the demo model was trained


class Objective:
    """The forward process and the target of a model's own schedule (Ho et al. 2020; v: Salimans & Ho 2022)."""

    def __init__(self, scheduler: Any, *, weighting: Weighting = Weighting.UNIFORM, gamma: float = 5.0) -> None:
        """`scheduler` is the model's own diffusers object; `gamma` is for MIN_SNR.

        Raises:
            InvalidRequest: the schedule predicts something other than epsilon or v.
        """
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise InvalidRequest(
                "is not supported for training",
                field="prediction_type",
                value=kind,
                remedy="use a model whose scheduler predicts epsilon or v_prediction",
            )
        self._predicts_v = kind == "v_prediction"
        self._alphas: torch.Tensor = scheduler.alphas_cumprod  # (T,), the share of signal in the variance
        self.timesteps = len(self._alphas)
        self._weights = self._make_weights(weighting, gamma)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) as they are at timesteps (B,): sqrt(a) x + sqrt(1 - a) n."""
        signal, rest = self._amounts(timesteps, latents)
        return signal * latents + rest * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target of the model's output: the noise, or v = sqrt(a) n - sqrt(1 - a) x."""
        if not self._predicts_v:
            return noise
        signal, rest = self._amounts(timesteps, latents)
        return signal * noise - rest * latents

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) factors of the rows' errors."""
        return self._weights.to(timesteps.device)[timesteps]

    def _amounts(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = self._alphas.to(like)[timesteps].reshape(-1, *[1] * (like.dim() - 1))
        return alphas.sqrt(), (1 - alphas).sqrt()

    def _make_weights(self, weighting: Weighting, gamma: float) -> torch.Tensor:
        ratio = self._alphas / (1 - self._alphas).clamp(min=1e-8)
        if weighting is Weighting.MIN_SNR:
            weights = ratio.clamp(max=gamma) / ((ratio + 1) if self._predicts_v else ratio.clamp(min=1e-8))
        elif weighting is Weighting.NOISY:
            weights = 1 / (ratio.sqrt() + _NOISY_FLOOR)
        else:
            weights = torch.ones_like(ratio)
        return weights / weights.mean()
