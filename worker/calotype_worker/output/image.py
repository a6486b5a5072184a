"""Encodes images with their provenance inside, so that a file found anywhere says how to make it again.

PNG carries text chunks: `calotype` (JSON, everything) and `parameters` (the line that AUTOMATIC1111's web UI writes
and many tools read). WebP and JPEG carry the JSON as the EXIF ImageDescription.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from calotype_shared.schema import a1111
from calotype_shared.schema.enums import OutputFormat
from calotype_shared.schema.resolve import ResolvedConfig

QUALITY = 92  # of WebP and JPEG
_IMAGE_DESCRIPTION = 0x010E  # EXIF tag


def encode_image(pixels: np.ndarray, output_format: OutputFormat, provenance: Mapping[str, Any]) -> bytes:
    """An image file of `pixels`, uint8 (H, W, 3), with `provenance` inside."""
    image = Image.fromarray(pixels)
    text = json.dumps(provenance, sort_keys=True)
    buffer = io.BytesIO()
    if output_format is OutputFormat.PNG:
        chunks = PngInfo()
        chunks.add_itxt("calotype", text)
        if "parameters" in provenance:
            chunks.add_itxt("parameters", str(provenance["parameters"]))
        image.save(buffer, "PNG", pnginfo=chunks, compress_level=4)
    else:
        exif = Image.Exif()
        exif[_IMAGE_DESCRIPTION] = text
        image.save(buffer, output_format.value.upper(), quality=QUALITY, exif=exif)
    return buffer.getvalue()


def read_provenance(data: bytes) -> dict[str, Any]:
    """What `encode_image` put into a file. Empty for an image that is not ours."""
    with Image.open(io.BytesIO(data)) as image:
        text = getattr(image, "text", {}).get("calotype") or image.getexif().get(_IMAGE_DESCRIPTION)
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
