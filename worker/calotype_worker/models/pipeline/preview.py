"""`PreviewMap`: rough images of a pipeline's latents, by a linear map that is fitted to its own results.

It needs no knowledge of the autoencoder, its scaling, or how a pipeline packs latents into tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_ENOUGH = 64  # results after which the map stays as it is
_REHEARSED = 1e-3  # weight of results of the first runs, which have few steps
_RIDGE = 1e-6  # of the inputs' mean square


@dataclass(kw_only=True, eq=False)
class PreviewMap:
    """Owned by the engine's thread. From one latent cell (or token) to the mean color of its pixels."""

    latent_channels: int | None  # of the autoencoder
    channels: int  # of a cell, which may be several latents
    products: torch.Tensor  # (channels + 1, channels + 1), the sum of each cell's outer product
    colors: torch.Tensor  # (channels + 1, 3)
    results: int = 0
    weights: torch.Tensor | None = None  # (channels + 1, 3)

    @classmethod
    def of(cls, latents: Any, image: np.ndarray, latent_channels: int | None) -> PreviewMap | None:
        """From the final latents and the image of a first run; None: the latents are not laid out like the image."""
        cells = _cells(latents, image.shape[1], image.shape[0], latent_channels)
        if cells is None:
            return None
        channels = cells.shape[-1]
        made = cls(
            latent_channels=latent_channels,
            channels=channels,
            products=torch.zeros(channels + 1, channels + 1, dtype=torch.float64),
            colors=torch.zeros(channels + 1, 3, dtype=torch.float64),
        )
        made._add(cells, image, _REHEARSED)
        return made

    def learn(self, latents: Any, image: np.ndarray) -> None:
        """From the final latents of a request and its image, uint8 (H, W, 3)."""
        if self.results >= _ENOUGH:
            return
        cells = _cells(latents, image.shape[1], image.shape[0], self.latent_channels)
        if cells is not None and cells.shape[-1] == self.channels:
            self._add(cells, image, 1.0)
            self.results += 1

    def image(self, latents: torch.Tensor, width: int, height: int) -> np.ndarray | None:
        """A rough image, uint8 (h, w, 3), one pixel per cell; None: these latents are of another layout."""
        cells = _cells(latents, width, height, self.latent_channels)
        if cells is None or cells.shape[-1] != self.channels:
            return None
        if self.weights is None:
            ridge = _RIDGE * self.products.diagonal().mean() * torch.eye(self.channels + 1, dtype=torch.float64)
            self.weights = torch.linalg.solve(self.products + ridge, self.colors)
        image = _with_one(cells.double().cpu().flatten(0, 1)) @ self.weights
        pixels = image.reshape(*cells.shape[:2], 3).nan_to_num().clamp(0, 1).mul(255).round()
        return pixels.to(torch.uint8).numpy()

    def _add(self, cells: torch.Tensor, image: np.ndarray, weight: float) -> None:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).double().unsqueeze(0) / 255
        wanted = torch.nn.functional.adaptive_avg_pool2d(pixels, (cells.shape[0], cells.shape[1]))[0].flatten(1).T
        inputs = _with_one(cells.double().cpu().flatten(0, 1))
        if inputs.isfinite().all():
            self.products += weight * inputs.T @ inputs
            self.colors += weight * inputs.T @ wanted
            self.weights = None


def _with_one(cells: torch.Tensor) -> torch.Tensor:
    return torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1)


def _cells(latents: Any, width: int, height: int, channels: int | None) -> torch.Tensor | None:
    """(h, w, channels) of the first row, of a video its middle frame; None: not laid out like the image.

    `channels`: of the autoencoder's latents.
    """
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        return None
    if latents.ndim == 3:  # tokens, row by row; they may have been laid side by side in groups of 2x2 cells
        tokens = latents.shape[1]
        rows = round((tokens * height / width) ** 0.5)
        if not rows or tokens % rows or abs(tokens // rows * height - rows * width) > max(width, height):
            return None
        return latents[0].reshape(rows, tokens // rows, -1)
    if latents.ndim == 5:  # (batch, channels, frames, h, w), or frames before channels
        if channels not in latents.shape[1:3]:
            return None
        first, second = latents.shape[1:3]
        latents = latents[:, :, second // 2] if first == channels else latents[:, first // 2]
    if latents.ndim != 4 or latents.shape[-2] * width != latents.shape[-1] * height:
        return None
    return latents[0].permute(1, 2, 0)
