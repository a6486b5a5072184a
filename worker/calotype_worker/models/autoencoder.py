"""`Autoencoder`: images to latents and back, and previews of latents at almost no cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from calotype_shared.errors import ModelLoadError
from calotype_shared.schema.enums import Feature

# A ConsistencyDecoderVAE, for example, draws noise of its own, so its images depend on what else runs.
_KNOWN = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
_FROM_IMAGES = {Feature.IMAGE_TO_IMAGE, Feature.INPAINTING}
_PROBE_CELLS = 8  # the sides of latents that are decoded to check the weights


class Autoencoder:
    """A diffusers autoencoder; `using` is a context in which it is on its device."""

    def __init__(self, vae: Any, *, name: str, using: Callable[[], AbstractContextManager[None]]) -> None:
        """Raises ModelLoadError: its class is not supported."""
        check_autoencoder(vae, name=name)
        self.vae = vae
        self._name = name
        self._using = using
        self._factor = factor_of(vae)

    def place(self, device: torch.device) -> None:
        """Where its inputs go; that of an offloaded one cannot be read from its weights."""
        self._device = device
        config = self.vae.config
        self._scale = config.scaling_factor
        # Playground 2.5 normalizes each channel; others shift all channels, or none.
        channels = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if None not in channels:
            self._shift, self._spread = (torch.tensor(c, device=device).reshape(1, -1, 1, 1) for c in channels)
        else:
            self._shift = torch.tensor(getattr(config, "shift_factor", None) or 0.0, device=device)
            self._spread = torch.tensor(1.0, device=device)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return int(self.vae.config.latent_channels), height // self._factor, width // self._factor

    def unable(self) -> frozenset[Feature]:
        """Decode and encode something, and return the features that it does not have.

        Raises:
            ModelLoadError: what it decodes is not finite, or it cannot decode.
        """
        shape = (1, int(self.vae.config.latent_channels), _PROBE_CELLS, _PROBE_CELLS)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._device)
        try:
            finite = bool(self._pixels(latents).isfinite().all())
        except Exception as error:
            raise ModelLoadError(
                f"model {self._name!r}: its autoencoder {type(self.vae).__name__} cannot decode latents "
                f"({type(error).__name__}: {error}); use another one in vae/"
            ) from error
        if not finite:
            raise ModelLoadError(
                f"model {self._name!r}: its autoencoder's images are not finite (NaN or infinity) in "
                f"{str(self.vae.dtype).removeprefix('torch.')}; download vae/ again, or use --dtype float32 or bfloat16"
            )
        side = _PROBE_CELLS * self._factor
        try:
            found = self._encoded(torch.zeros(1, 3, side, side))
        except Exception:
            return frozenset({*_FROM_IMAGES, Feature.PREVIEW})
        # diffusers draws no noise for an encoding without a deviation, so later noise would differ from its.
        return frozenset() if hasattr(found, "latent_dist") else frozenset(_FROM_IMAGES)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._encoded(pixels)
        if hasattr(found, "latent_dist"):
            mean, deviation = found.latent_dist.mean.float(), found.latent_dist.std.float()
        else:
            mean = found.latents.float()
            deviation = torch.zeros_like(mean)
        scale = self._scale / self._spread
        return (mean - self._shift) * scale, deviation * scale

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        pixels = self._pixels(latents)
        return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def preview(self, latents: torch.Tensor) -> np.ndarray:
        flat = latents.float().flatten(1).T  # (h·w, C)
        rgb = torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1) @ self._preview_weights
        image = rgb.reshape(*latents.shape[1:], 3).clamp(0, 1).mul(255).round()
        return image.to(torch.uint8).cpu().numpy()

    @torch.inference_mode()
    def _encoded(self, pixels: torch.Tensor) -> Any:
        with self._using():
            return self.vae.encode(pixels.to(self._device, self.vae.dtype))

    @torch.inference_mode()
    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in -1..1."""
        scaled = (latents * self._spread / self._scale + self._shift).to(self.vae.dtype)
        with self._using():
            decoded: torch.Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return decoded.float()

    @functools.cached_property
    def _preview_weights(self) -> torch.Tensor:
        """(C + 1, 3): the least-squares map from a latent cell to its pixels' mean color, for any autoencoder.

        Fitted once, on images of smooth colors encoded by the autoencoder.
        """
        generator = torch.Generator().manual_seed(0)
        side = 16 * self._factor
        coarse = torch.rand((8, 3, 4, 4), generator=generator)
        images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
        mean, _ = self.encode(images * 2 - 1)
        cells = mean.permute(0, 2, 3, 1).flatten(0, 2)
        colors = torch.nn.functional.avg_pool2d(images, self._factor).permute(0, 2, 3, 1).flatten(0, 2)
        inputs = torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1).cpu()
        return torch.linalg.lstsq(inputs, colors).solution.to(self._device)


def factor_of(vae: Any) -> int:
    """Pixels per latent cell, of a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def check_autoencoder(vae: Any, *, name: str) -> None:
    """Raises ModelLoadError if it is of a class that cannot be used."""
    if type(vae).__name__ not in _KNOWN:
        raise ModelLoadError(
            f"model {name!r}: its autoencoder is of class {type(vae).__name__}, and only {', '.join(_KNOWN)} are "
            "supported; use another one in vae/, or run the model by its own pipeline with --run-as pipeline"
        )
