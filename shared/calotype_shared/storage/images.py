"""Input images: checked, normalized, and named by their hash.

An upload is a PNG without metadata under `uploads/{sha256}.png`. Its name is the hash of its pixels' file, so a config
that names uploads still reproduces its image, equal uploads are stored once, and an upload cannot be replaced.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import TYPE_CHECKING

from calotype_shared.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP")


def upload_key(upload_id: str) -> str:
    return f"uploads/{upload_id}.png"


def normalize_image(data: bytes, *, field: str = "image") -> tuple[str, bytes]:
    """An image file as an upload: its id and the bytes to store.

    The image is rotated by its EXIF data and converted to RGB (transparent parts over white), without metadata.

    Raises:
        InvalidRequest: too large, not a PNG, JPEG or WebP file, more than `MAX_PIXELS` pixels, animated, or broken.
    """
    if len(data) > MAX_BYTES:
        raise InvalidRequest(
            f"is larger than {MAX_BYTES} bytes", field=field, value=f"{len(data)} bytes", remedy="use a smaller file"
        )
    buffer = io.BytesIO()
    # Always encoded in the same way, because the hash is of these bytes.
    _decoded(data, field).save(buffer, "PNG", compress_level=6)
    stored = buffer.getvalue()
    return hashlib.sha256(stored).hexdigest(), stored


def open_upload(data: bytes, upload_id: str) -> Image:
    """The image of a stored upload, RGB. It is checked again, because others may write to the bucket.

    Raises:
        InvalidRequest: it is not the file that the id names, or not an image we would have stored.
    """
    if hashlib.sha256(data).hexdigest() != upload_id:
        raise InvalidRequest("the stored file was changed", field="upload", value=upload_id, remedy="upload it again")
    return _decoded(data, "upload")


def _decoded(data: bytes, field: str) -> Image:
    import PIL.Image  # noqa: PLC0415 - not free to import, and most jobs have no images
    import PIL.ImageOps  # noqa: PLC0415

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own limit is below
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InvalidRequest(
                        f"has more than {MAX_PIXELS} pixels",
                        field=field,
                        value=f"{width}x{height}",
                        remedy="use a smaller image",
                    )
                if getattr(image, "n_frames", 1) > 1:
                    raise InvalidRequest(
                        "is animated", field=field, value=f"{image.format}", remedy="give a still image"
                    )
                image.load()
                turned = PIL.ImageOps.exif_transpose(image)
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything for a broken file
        raise InvalidRequest(
            f"is not a readable image ({type(error).__name__})",
            field=field,
            value=f"{len(data)} bytes",
            remedy=f"give a {', '.join(FORMATS)} file",
        ) from error
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        over = PIL.Image.new("RGBA", turned.size, "white")
        turned = PIL.Image.alpha_composite(over, turned.convert("RGBA"))
    plain = PIL.Image.new("RGB", turned.size)  # a fresh one carries no metadata
    plain.paste(turned.convert("RGB"))
    return plain


def fitted(image: Image, width: int, height: int, *, mask: bool = False) -> Image:
    """The image at exactly that size in pixels: scaled to cover it and center-cropped."""
    import PIL.Image  # noqa: PLC0415
    import PIL.ImageOps  # noqa: PLC0415

    method = PIL.Image.Resampling.NEAREST if mask else PIL.Image.Resampling.LANCZOS
    return PIL.ImageOps.fit(image, (width, height), method=method)
