"""Reads shape, color and background off an image's pixels, to score whether it follows its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from calotype_train.demo.scenes import COLORS, SHAPES, outline

_SIDE = 48  # pixels of the normalized mask that shapes are compared in
_FOREGROUND = 60.0  # minimum RGB distance from the background for a pixel of the shape
_LEAST = 40  # pixels of a shape; fewer is a speck


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What an image shows. `shape` and `color` are None if nothing differs from the background."""

    background: str
    shape: str | None
    color: str | None
    likeness: float  # of the mask and the shape's outline: intersection over union


def look(image: np.ndarray) -> Seen:
    """`image`: uint8 (H, W, 3) with one shape on a plain background."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    mask = np.linalg.norm(pixels - ground, axis=-1) > _FOREGROUND
    mask = _largest_part(mask)
    if mask.sum() < _LEAST:
        return Seen(background=_nearest(ground), shape=None, color=None, likeness=0.0)
    color = _nearest(np.median(pixels[_eroded(mask)], axis=0))
    shape, likeness = _closest_shape(mask)
    return Seen(background=_nearest(ground), shape=shape, color=color, likeness=likeness)


def _nearest(rgb: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.square(np.asarray(COLORS[name]) - rgb).sum()))


def _eroded(mask: np.ndarray) -> np.ndarray:
    """The mask without the blended pixels of its edge, if enough pixels remain."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis)
    return inner if inner.sum() >= _LEAST // 2 else mask


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected part of a mask, by spreading labels to neighbours until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.max(
            [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]], 0
        )
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    names, counts = np.unique(labels[mask], return_counts=True)
    return labels == names[counts.argmax()] if len(names) else mask


def _closest_shape(mask: np.ndarray) -> tuple[str, float]:
    seen = _normalized(mask)
    likeness = {shape: float((seen & own).sum() / (seen | own).sum()) for shape, own in _templates().items()}
    best = max(likeness, key=lambda shape: likeness[shape])
    return best, likeness[best]


def _normalized(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box, scaled to a square without keeping its aspect."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scaled = Image.fromarray(box.astype(np.uint8) * 255).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return np.asarray(scaled) > 127


@cache
def _templates() -> dict[str, np.ndarray]:
    masks = {}
    for shape in SHAPES:
        canvas = Image.new("L", (400, 400))
        pen = ImageDraw.Draw(canvas)
        if shape == "circle":
            pen.ellipse((50, 50, 350, 350), fill=255)
        elif shape == "ring":
            pen.ellipse((50, 50, 350, 350), outline=255, width=63)
        else:
            pen.polygon([(200 + 150 * x, 200 + 150 * y) for x, y in outline(shape)], fill=255)
        masks[shape] = _normalized(np.asarray(canvas) > 0)
    return masks
