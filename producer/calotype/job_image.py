"""`JobImage`: one finished image, downloaded."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.jobs import ImageRef

if TYPE_CHECKING:
    from PIL.Image import Image


ImageSource = Any  # a file's path or bytes, or a Pillow image


def is_image(value: object) -> bool:
    """Whether this is an image instead of the id of an upload. A plain string is an id."""
    return isinstance(value, (bytes, Path)) or hasattr(value, "tobytes")


def image_bytes(image: object, field: str) -> bytes:
    """The image as the bytes of a file.

    Raises:
        InvalidRequest: the file does not exist or is not an image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise InvalidRequest(
                f"cannot be read ({error.strerror})", field=field, value=str(image), remedy="give an image file"
            ) from error
    import PIL.Image  # noqa: PLC0415

    if not isinstance(image, PIL.Image.Image):
        raise InvalidRequest(
            f"is of type {type(image).__name__}",
            field=field,
            value="an object",
            remedy="give a path, the bytes of a file, or a Pillow image",
        )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class JobImage:
    """The encoded bytes of an image, as its record describes them. `index` counts within the job, from 0."""

    job_id: str
    index: int
    ref: ImageRef
    data: bytes

    @property
    def name(self) -> str:
        """A file name that is unique to this image."""
        return f"{self.job_id}-{self.index}.{self.ref.key.rpartition('.')[2]}"

    @cached_property
    def image(self) -> Image:
        """The decoded image (Pillow)."""
        import PIL.Image  # noqa: PLC0415 - decoding is optional and Pillow not free to import

        return PIL.Image.open(io.BytesIO(self.data))

    def save(self, path: str | Path) -> Path:
        """Write the bytes as they are, to a file or, under `name`, into an existing folder; returns the file."""
        file = Path(path)
        if file.is_dir():
            file = file / self.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.data)
        return file
