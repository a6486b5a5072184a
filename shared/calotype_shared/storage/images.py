"""Input images: checked, normalized, and named by their hash.

An upload is a PNG without metadata under `uploads/{sha256}.png`. Its name is the hash of its pixels' file, so a config
that names uploads still reproduces its image, equal uploads are stored once, and an upload cannot be replaced.
"""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from calotype_shared.errors import InvalidRequest
from calotype_shared.forking import reset_in_children

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 32 * 2**20
# Pillow keeps most modes in four bytes per pixel, and an image is copied at most once: about 200 MB at one time.
MAX_PIXELS = PIXELS_AT_ONCE = 25_000_000
_MAX_STORED_PIXELS = 64_000_000  # what earlier versions stored
_STRIP_ROWS = 64
FORMATS = ("PNG", "JPEG", "WEBP")
MASKS = ("mask", "mask_image")  # fields whose images are masks


def upload_key(upload_id: str) -> str:
    return f"uploads/{upload_id}.png"


def normalize_image(data: bytes, *, field: str = "image") -> tuple[str, bytes]:
    """An image file as an upload: its id and the bytes to store.

    The image is rotated by its EXIF data and converted to RGB, without metadata. Transparent parts become white; those
    of a mask (`field` is one of `MASKS`) black, so that white strokes on a transparent image are what is repainted.

    Raises:
        InvalidRequest: too large, not a PNG, JPEG or WebP file, more than `MAX_PIXELS` pixels, animated, or broken.
    """
    if len(data) > MAX_BYTES:
        raise InvalidRequest(
            f"is larger than {MAX_BYTES} bytes", field=field, value=f"{len(data)} bytes", remedy="use a smaller file"
        )
    buffer = io.BytesIO()
    with decoding(data, field) as image:
        # Always encoded in the same way, because the hash is of these bytes.
        plain = as_rgb(image, over="black" if field in MASKS else "white")
        if plain is not image:
            image.close()
        plain.save(buffer, "PNG", compress_level=6)
        plain.close()  # frees its pixels while they still count
    stored = buffer.getvalue()
    return hashlib.sha256(stored).hexdigest(), stored


def open_upload(data: bytes, upload_id: str, *, fit: tuple[int, int] | None = None, mask: bool = False) -> Image:
    """The image of a stored upload, RGB; with `fit`, at that width and height as by `fitted`.

    It is checked again, because others may write to the bucket.

    Raises:
        InvalidRequest: it is not the file that the id names, or not an image we would have stored.
    """
    if hashlib.sha256(data).hexdigest() != upload_id:
        raise InvalidRequest("the stored file was changed", field="upload", value=upload_id, remedy="upload it again")
    with decoding(data, "upload", most=_MAX_STORED_PIXELS) as image:
        plain = as_rgb(image)
        return plain if fit is None else fitted(plain, *fit, mask=mask)


@contextmanager
def decoding(data: bytes, field: str = "image", *, most: int = MAX_PIXELS) -> Iterator[Image]:
    """The first image of a file, upright, in its own mode. All images that are open at one time share `PIXELS_AT_ONCE`.

    Raises:
        InvalidRequest: not a PNG, JPEG or WebP file, more than `most` pixels, animated, or broken.
    """
    import PIL.ImageOps  # noqa: PLC0415 - not free to import, and most jobs have no images

    with _refused_if_broken(data, field):
        image = _opened(data, field, most)
    with _pixels.held(image.width * image.height):
        with _refused_if_broken(data, field):
            image.load()
            PIL.ImageOps.exif_transpose(image, in_place=True)
        yield image


def as_rgb(image: Image, *, over: str = "white") -> Image:
    """RGB without metadata, transparent parts over that color. `image` may be changed, and must not be used any more.

    Made a strip at a time: beside `image` there is at most one other copy of all pixels.
    """
    import PIL.Image  # noqa: PLC0415

    if image.mode == "RGB" and "transparency" not in image.info:
        image.info.clear()  # and nothing else is written into a PNG file
        return image
    plain = PIL.Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height)))
        plain.paste(_strip_as_rgb(strip, over), (0, top))
    return plain


def _strip_as_rgb(strip: Image, over: str) -> Image:
    import PIL.Image  # noqa: PLC0415

    if strip.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in strip.info:
        below = PIL.Image.new("RGBA", strip.size, over)
        return PIL.Image.alpha_composite(below, strip.convert("RGBA")).convert("RGB")
    if strip.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scaling
        return strip.convert("I").point(lambda value: value / 257).convert("L").convert("RGB")
    return strip.convert("RGB")


def _opened(data: bytes, field: str, most: int) -> Image:
    """Only the file's head is read. Raises InvalidRequest."""
    import PIL.Image  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own limit is below
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > most:
        raise InvalidRequest(
            f"has more than {most} pixels", field=field, value=f"{width}x{height}", remedy="use a smaller image"
        )
    # Phones store depth maps and previews as further images of a JPEG file (MPO): the first one is the photograph.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise InvalidRequest("is animated", field=field, value=f"{image.format}", remedy="give a still image")
    return image


@contextmanager
def _refused_if_broken(data: bytes, field: str) -> Iterator[None]:
    try:
        yield
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything for a broken file
        raise InvalidRequest(
            f"is not a readable image ({type(error).__name__})",
            field=field,
            value=f"{len(data)} bytes",
            remedy=f"give a {', '.join(FORMATS)} file",
        ) from error


class _Pixels:
    """Pixels that may be decoded at one time in this process. Others wait for their turn. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.after_fork()
        reset_in_children(self)

    def after_fork(self) -> None:
        self._freed = threading.Condition()
        self._used = 0

    @contextmanager
    def held(self, pixels: int) -> Iterator[None]:
        freed = self._freed
        with freed:
            freed.wait_for(lambda: self._used == 0 or self._used + pixels <= self._most)
            self._used += pixels
        try:
            yield
        finally:
            with freed:
                self._used -= pixels
                freed.notify_all()


_pixels = _Pixels(PIXELS_AT_ONCE)


def fitted(image: Image, width: int, height: int, *, mask: bool = False) -> Image:
    """The image at exactly that size in pixels: scaled to cover it and center-cropped."""
    import PIL.Image  # noqa: PLC0415
    import PIL.ImageOps  # noqa: PLC0415

    method = PIL.Image.Resampling.NEAREST if mask else PIL.Image.Resampling.LANCZOS
    return PIL.ImageOps.fit(image, (width, height), method=method)
