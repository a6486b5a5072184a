"""Encodes images with their provenance inside, and reads it back."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from calotype_shared.schema import a1111
from calotype_shared.schema.enums import OutputFormat
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.storage.image_file import IMAGE_DESCRIPTION, write_image


def encode_image(pixels: np.ndarray, output_format: OutputFormat, provenance: Mapping[str, Any]) -> bytes:
    """An image file of `pixels`, uint8 (H, W, 3), with `provenance` inside."""
    return write_image(Image.fromarray(pixels), output_format, provenance)


def read_provenance(data: bytes) -> dict[str, Any]:
    """The metadata that `encode_image` wrote. Empty for other images."""
    with Image.open(io.BytesIO(data)) as image:
        text = getattr(image, "text", {}).get("calotype") or image.getexif().get(IMAGE_DESCRIPTION)
    if not text:
        return {}
    found: dict[str, Any] = json.loads(text)
    return found


def parameters_line(config: ResolvedConfig, *, seed: int, steps: int) -> str:
    """The settings as AUTOMATIC1111's web UI writes them into its images."""
    lines = [config.prompt]
    if config.negative_prompt:
        lines.append(f"Negative prompt: {config.negative_prompt}")
    lines.append(
        f"Steps: {steps}, Sampler: {a1111.NAMES[config.sampler]}, CFG scale: {config.guidance_scale:g}, "
        f"Seed: {seed}, Size: {config.width}x{config.height}, Model: {config.model}"
    )
    return "\n".join(lines)
