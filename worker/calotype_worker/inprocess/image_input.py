"""`ImageInput`: the accepted types of images and masks, and their conversion to the bytes of a file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from calotype_shared.errors import InvalidRequest

ImageInput = np.ndarray | Image.Image | str | Path | bytes  # uint8 (H, W, 3), or an image file or its bytes


def image_bytes(image: ImageInput) -> bytes:
    """An image as the bytes of a file."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise InvalidRequest(
                f"is {image.dtype} {image.shape}",
                field="image",
                value="an array",
                remedy="give uint8 (H, W, 3), 0 to 255",
            )
        image = Image.fromarray(image)
    return _png(image)


def mask_bytes(mask: ImageInput) -> bytes:
    """A mask as the bytes of a file: an array of 0 and 1 (or booleans) counts as black and white."""
    if not isinstance(mask, np.ndarray):
        return image_bytes(mask)
    flat = mask[..., 0] if mask.ndim == 3 else mask
    if mask.dtype == np.bool_ or flat.max(initial=0) <= 1:
        flat = np.asarray(flat, dtype=np.float64).clip(0, 1) * 255
    return image_bytes(np.asarray(flat).round().astype(np.uint8))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
