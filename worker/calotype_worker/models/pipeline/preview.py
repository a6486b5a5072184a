"""`Previews`: rough images of a pipeline's latents at almost no cost, without code for its class.

A first run shows both what the scheduler ended with and what the autoencoder got to decode. How one follows from the
other is found by trying the usual layouts: each feature of the one must be an affine function of that of the other. The
colors of the autoencoder's latents are a linear map, fitted to images of smooth colors that it encoded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calotype_worker.models.pipeline.stand_in import Call

log = logging.getLogger(__name__)

_TOLERANCE = 2e-2  # of the features' spread; in 16 bits, scaling rounds
_LEAST_CELLS = 4  # of a first run: fewer fit any line


@dataclass(frozen=True)
class _Layout:
    """How the latents of a scheduler hold those of an autoencoder, (frames, C, h, w)."""

    kind: str  # image: (1, C, h, w); video: (1, C, F, h, w); frames: (1, F, C, h, w); tokens: (1, F·h·w / p², C·p²)
    patch: int = 1
    channels_first: bool = True  # in a token: before the positions in its patch

    def features(self, latents: torch.Tensor) -> torch.Tensor:
        """(cells, features) of latents (F, C, h, w), in the order of `grid`."""
        frames, channels, h, w = latents.shape
        p = self.patch
        parts = latents.reshape(frames, channels, h // p, p, w // p, p)
        parts = parts.permute(0, 2, 4, 1, 3, 5) if self.channels_first else parts.permute(0, 2, 4, 3, 5, 1)
        return parts.flatten(3).flatten(0, 2)

    def grid(self, latents: torch.Tensor) -> torch.Tensor | None:
        """(cells, features) of a scheduler's latents; None: not of this layout."""
        if self.kind == "tokens":
            return latents[0] if latents.ndim == 3 else None
        if latents.ndim != (4 if self.kind == "image" else 5):
            return None
        if self.kind == "image":
            return self.features(latents[:1])
        return self.features(latents[0].transpose(0, 1) if self.kind == "video" else latents[0])

    def back(self, features: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """Latents (F, C, h, w) of (cells, features)."""
        p = self.patch
        channels = features.shape[1] // p**2
        order = (channels, p, p) if self.channels_first else (p, p, channels)
        parts = features.reshape(-1, h // p, w // p, *order)
        parts = parts.permute(0, 3, 1, 4, 2, 5) if self.channels_first else parts.permute(0, 5, 1, 3, 2, 4)
        return parts.reshape(-1, channels, h, w)


_LAYOUTS = (
    _Layout("image"),
    _Layout("video"),
    _Layout("frames"),
    *(_Layout("tokens", patch, first) for patch in (2, 1) for first in (True, False)),
)


@dataclass(frozen=True, kw_only=True)
class Previews:
    """For any thread; `image` waits for the device."""

    layout: _Layout
    scale: torch.Tensor  # (features,) float64, and with `shift` from the scheduler's latents to the autoencoder's
    shift: torch.Tensor
    colors: torch.Tensor  # (C + 1, 3) float64
    factor: int  # pixels per latent cell

    @classmethod
    def of(cls, latents: Any, calls: Sequence[Call], place: Callable[[str], None]) -> Previews | None:
        """From a first run: its scheduler's last latents and its network calls.

        `place` brings a network to the device. None: it has no autoencoder, or another way from latents to images.
        """
        call = next((call for call in calls if call.method == "decode" and hasattr(call.module, "encode")), None)
        decoded = None if call is None else next(iter((*call.args, *call.kwargs.values())), None)
        if call is None or not isinstance(latents, torch.Tensor) or not isinstance(decoded, torch.Tensor):
            return None
        if decoded.ndim not in (4, 5):
            return None
        own = decoded[0].transpose(0, 1) if decoded.ndim == 5 else decoded
        for layout in _LAYOUTS:
            found = _affine(layout, latents.detach().double().cpu(), own.detach().double().cpu())
            if found is not None:
                try:
                    place(call.component)
                    colors, factor = _colors(call.module, channels=own.shape[1], video=decoded.ndim == 5)
                except Exception as error:  # of an autoencoder that cannot do what others can
                    log.warning("no previews", exc_info=error)
                    return None
                return cls(layout=layout, scale=found[0], shift=found[1], colors=colors, factor=factor)
        return None

    def image(self, latents: torch.Tensor, width: int, height: int) -> np.ndarray:
        """A rough image of the scheduler's latents, of a video its middle frame: uint8 (h, w, 3), a pixel per cell."""
        features = self.layout.grid(latents.detach())
        if features is None:
            raise ValueError(f"latents of shape {tuple(latents.shape)} are not laid out as those of the first run")
        h, w = height // self.factor, width // self.factor
        if self.layout.kind != "tokens":  # some pipelines make another size, and fit the image to that which was asked
            h, w = latents.shape[-2:]
        frames = self.layout.back(features.double().cpu() * self.scale + self.shift, h, w)
        cells = frames[len(frames) // 2].flatten(1).T
        pixels = (_with_one(cells) @ self.colors).reshape(h, w, 3).nan_to_num().clamp(0, 1).mul(255).round()
        return pixels.to(torch.uint8).numpy()


def _affine(layout: _Layout, latents: torch.Tensor, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Each feature's scale and shift from the latents to the decoded; None: it is not a function of this kind."""
    given = layout.grid(latents)
    if given is None or decoded.shape[-2] % layout.patch or decoded.shape[-1] % layout.patch:
        return None
    wanted = layout.features(decoded)
    if given.shape[1] != wanted.shape[1] or len(given) < len(wanted) or len(wanted) < _LEAST_CELLS:
        return None
    given = given[: len(wanted)]  # long videos are decoded in pieces
    spread = given - given.mean(0)
    scale = (spread * (wanted - wanted.mean(0))).sum(0) / spread.square().sum(0).clamp(min=1e-12)
    shift = wanted.mean(0) - scale * given.mean(0)
    wrong = (given * scale + shift - wanted).square().mean().sqrt()
    return (scale, shift) if float(wrong) <= _TOLERANCE * float(wanted.std()) else None


def _colors(autoencoder: Any, *, channels: int, video: bool) -> tuple[torch.Tensor, int]:
    """The least-squares map from a cell of its latents to its pixels' mean color, and pixels per cell.

    From images of smooth colors.
    """
    coarse = torch.rand((8, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    weight = next(autoencoder.parameters())

    def encoded(side: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear", align_corners=True)
        inputs = (images * 2 - 1).to(weight.device, weight.dtype)
        # One by one: not every autoencoder takes several.
        found = [_encoded(autoencoder.encode(one.unsqueeze(2) if video else one)) for one in inputs.split(1)]
        return images, torch.cat([one[:, :channels] for one in found])

    images, cells = encoded(128)
    factor = 128 // cells.shape[-1]
    if cells.shape[-1] != 16:
        images, cells = encoded(16 * factor)
    flat = cells.reshape(len(images), channels, 16, 16).double().cpu().permute(0, 2, 3, 1).flatten(0, 2)
    wanted = torch.nn.functional.avg_pool2d(images, factor).double().permute(0, 2, 3, 1).flatten(0, 2)
    return torch.linalg.lstsq(_with_one(flat), wanted).solution, factor


def _encoded(output: Any) -> torch.Tensor:
    """The latents in an autoencoder's output; of a distribution, its mean."""
    if hasattr(output, "latent_dist"):
        mean: torch.Tensor = output.latent_dist.mean
        return mean
    found: torch.Tensor = next(output[name] for name in ("latents", "latent") if name in output)
    return found


def _with_one(cells: torch.Tensor) -> torch.Tensor:
    return torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1)
