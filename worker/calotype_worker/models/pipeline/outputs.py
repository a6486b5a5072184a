"""Reads a pipeline's results: images, frames, sound or a mesh, whatever the names of the fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from calotype_shared.errors import GenerationFailed
from calotype_worker.models.pipeline.copies import parts
from calotype_worker.request import Audio, Mesh

_FIELDS = ("images", "image", "frames", "videos", "video", "audios")
_SOUND = ("audio", "audios", "sound")
NAMES = frozenset({*_FIELDS, *_SOUND})  # of results


@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """Exactly one is set; sound may be set together with frames."""

    image: np.ndarray | None = None  # uint8 (H, W, 3)
    frames: np.ndarray | None = None  # uint8 (F, H, W, 3)
    audio: Audio | None = None
    mesh: Mesh | None = None

    @property
    def kind(self) -> str:
        if self.mesh is not None:
            return "mesh"
        if self.frames is not None:
            return "video"
        return "image" if self.image is not None else "audio"

    def shown(self, width: int, height: int) -> np.ndarray:
        """An image that represents it, uint8 (h, w, 3): the image, middle frame, mesh from the front, or waveform."""
        if self.image is not None:
            return self.image
        if self.frames is not None:
            return self.frames[len(self.frames) // 2]
        if self.mesh is not None:
            return _drawn(self.mesh, width)
        assert self.audio is not None
        return _waveform(self.audio, width, height)


def read(result: Any, *, sample_rate: int) -> Output:
    """Read the first (and only) element of each of a pipeline's results.

    Raises:
        GenerationFailed: there is none, it is not finite, or its kind cannot be stored.
    """
    named = _named(result)
    sound = next((named[name] for name in _SOUND if named.get(name) is not None), None)
    audio = None if sound is None else _audio(sound, sample_rate)
    shown = next((named[name] for name in _FIELDS if named.get(name) is not None and named[name] is not sound), None)
    if shown is None:
        if audio is None:
            raise GenerationFailed(f"the pipeline returned {', '.join(named) or 'nothing'}, which cannot be stored")
        return Output(audio=audio)
    first = _first(shown)
    if hasattr(first, "verts") and hasattr(first, "faces"):
        return Output(mesh=_mesh(first))
    pixels = _pixels(first)
    if pixels.ndim == 4 and pixels.shape[0] > 1:
        return Output(frames=pixels, audio=audio)
    return Output(image=pixels if pixels.ndim == 3 else pixels[0], audio=audio)


def sample_rate(pipeline: Any) -> int:
    """Samples per second of a pipeline's sound."""
    for label, part in parts(pipeline):
        if label.rpartition(".")[2] in ("vocoder", "audio_vae", "vae"):
            config = getattr(part, "config", None)
            for name in ("output_sampling_rate", "sampling_rate", "sample_rate"):
                found = getattr(config, name, None)
                if isinstance(found, int):
                    return found
    return 16_000


def _named(result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return {str(key): value for key, value in result.items()}
    if isinstance(result, tuple | list):
        return {"images": result[0]} if len(result) else {}
    return dict(vars(result)) if hasattr(result, "__dict__") else {"images": result}


def _first(value: Any) -> Any:
    """Of a batch: its only element. A list of frames is one element."""
    if isinstance(value, torch.Tensor):
        value = value.float().cpu().numpy()
    if isinstance(value, np.ndarray):
        return value[0] if value.ndim >= 4 else value
    if isinstance(value, list | tuple):
        return _first(value[0]) if isinstance(value[0], torch.Tensor | np.ndarray) and len(value) == 1 else value[0]
    return value


def _pixels(value: Any) -> np.ndarray:
    """uint8 (H, W, 3), or (F, H, W, 3) for frames."""
    if isinstance(value, list | tuple):
        return np.stack([_pixels(part) for part in value])
    if isinstance(value, Image.Image):
        return np.asarray(value.convert("RGB"))
    array = value.float().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.ndim == 4 and array.shape[-1] not in (1, 3, 4):  # (F, C, H, W), or (C, F, H, W)
        array = np.moveaxis(array, 1 if array.shape[1] in (1, 3, 4) else 0, -1)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8:
        if not np.isfinite(array).all():
            raise GenerationFailed(
                "the result is not finite (NaN or infinity); use a lower guidance_scale, or run the model in float32 "
                "or bfloat16"
            )
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return np.ascontiguousarray(array[..., :3])


def _audio(value: Any, sample_rate: int) -> Audio:
    """float32 (channels, samples) in -1..1."""
    if isinstance(value, list | tuple):
        value = value[0]
    array = value.float().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, dtype=np.float32)
    while array.ndim > 2:
        array = array[0]
    if array.ndim == 2 and array.shape[0] > 8:  # a batch of one, or samples first
        array = array.T
    if array.ndim == 1:
        array = array[None]
    if not np.isfinite(array).all():
        raise GenerationFailed("the sound is not finite (NaN or infinity); run the model in float32 or bfloat16")
    return Audio(samples=np.ascontiguousarray(array, dtype=np.float32), rate=sample_rate)


def _mesh(surface: Any) -> Mesh:
    channels = surface.vertex_channels
    linear = torch.stack([channels[channel] for channel in "RGB"], dim=1).float()
    return Mesh(
        vertices=surface.verts.float().cpu().numpy(),
        faces=surface.faces.long().cpu().numpy(),
        colors=_srgb(linear).clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy(),
    )


def _srgb(linear: torch.Tensor) -> torch.Tensor:
    """Convert linear light to sRGB (IEC 61966-2-1), both 0..1.

    Shap-E's renderer gives a mesh's colors in linear light; programs that open a PLY expect sRGB.
    """
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def _drawn(mesh: Mesh, side: int) -> np.ndarray:
    """A mesh's vertices seen from the front, the nearest on top: uint8 (side, side, 3)."""
    image = np.full((side, side, 3), 255, dtype=np.uint8)
    order = np.argsort(-mesh.vertices[:, 1])
    places = ((mesh.vertices[order][:, [2, 0]] * (-1, 1) + 1) / 2 * side).astype(int).clip(0, side - 1)
    image[places[:, 0], places[:, 1]] = mesh.colors[order]
    return image


def _waveform(audio: Audio, width: int, height: int) -> np.ndarray:
    """A waveform image of sound: uint8 (height, width, 3)."""
    image = np.full((height, width, 3), 255, dtype=np.uint8)
    pieces = np.array_split(np.abs(audio.samples).max(axis=0), width)
    for column, piece in enumerate(pieces):
        half = int(min(1.0, float(piece.max(initial=0.0))) * height / 2)
        image[height // 2 - half : height // 2 + half + 1, column] = 64
    return image
