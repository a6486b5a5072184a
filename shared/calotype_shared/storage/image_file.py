"""Image files with their provenance inside, so that each file contains what is needed to reproduce it.

PNG carries text chunks: `calotype` (JSON, everything) and `parameters` (the line that AUTOMATIC1111's web UI writes
and many tools read). WebP and JPEG carry the JSON as the EXIF ImageDescription.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from calotype_shared.schema.enums import OutputFormat

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = 92  # of WebP and JPEG
IMAGE_DESCRIPTION = 0x010E  # EXIF tag


def write_image(image: Image, output_format: OutputFormat, provenance: Mapping[str, Any]) -> bytes:
    """The bytes of an RGB image as PNG, WebP or JPEG, with `provenance` inside."""
    import PIL.Image  # noqa: PLC0415 - not free to import, and most who import storage encode nothing
    from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415

    text = json.dumps(provenance, sort_keys=True)
    buffer = io.BytesIO()
    if output_format is OutputFormat.PNG:
        chunks = PngInfo()
        chunks.add_itxt("calotype", text)
        if "parameters" in provenance:
            chunks.add_itxt("parameters", str(provenance["parameters"]))
        image.save(buffer, "PNG", pnginfo=chunks, compress_level=4)
    else:
        exif = PIL.Image.Exif()
        exif[IMAGE_DESCRIPTION] = text
        image.save(buffer, output_format.value.upper(), quality=QUALITY, exif=exif)
    return buffer.getvalue()
