"""Image files with their provenance inside, so that each file contains what is needed to reproduce it.

PNG carries text chunks: `calotype` (JSON, everything) and `parameters` (the line that AUTOMATIC1111's web UI writes
and many tools read). WebP and JPEG carry the JSON as the EXIF ImageDescription, and that line as the UserComment.
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
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_UNICODE = b"UNICODE\0"  # how a UserComment says that it is UTF-16


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
        if "parameters" in provenance:
            comment = _UNICODE + str(provenance["parameters"]).encode("utf-16-be")
            exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = comment
        image.save(buffer, output_format.value.upper(), quality=QUALITY, exif=exif)
    return buffer.getvalue()


def read_texts(image: Image) -> dict[str, str]:
    """The texts in an image file by name: those of a PNG; `calotype` and `parameters` also of WebP and JPEG."""
    found = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    exif = image.getexif()
    if isinstance(description := exif.get(IMAGE_DESCRIPTION), str) and description.startswith("{"):
        found.setdefault("calotype", description)
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        raw = comment.removeprefix(_UNICODE)
        little = raw[1:2] == b"\0" != raw[:1]  # the web UI and Calotype write big-endian, some tools do not
        found.setdefault("parameters", raw.decode("utf-16-le" if little else "utf-16-be", "replace"))
    return found
