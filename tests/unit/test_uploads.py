"""Images that go in: what is kept of them, and what is refused."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from calotype_shared.errors import InvalidRequest
from calotype_shared.storage.images import MAX_BYTES, fitted, normalize_image, open_upload
from tests.models import sample_image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_same_image_has_one_name_and_no_metadata() -> None:
    """However it was packed: only pixels are left, and only they name it."""
    source = Image.fromarray(sample_image(1))
    exif = Image.Exif()
    exif[0x010F] = "a camera that tells where it was"
    packed = [
        encoded(source, "PNG"),
        encoded(source, "PNG", compress_level=0),
        encoded(source, "WEBP", lossless=True, exif=exif),
    ]
    uploads = [normalize_image(data) for data in packed]
    assert len({upload_id for upload_id, _ in uploads}) == 1
    upload_id, stored = uploads[-1]
    assert hashlib.sha256(stored).hexdigest() == upload_id
    assert b"camera" not in stored
    assert np.array_equal(np.asarray(open_upload(stored, upload_id)), sample_image(1))
    assert normalize_image(encoded(Image.fromarray(sample_image(2)), "PNG"))[0] != upload_id


def test_images_stand_upright_and_opaque() -> None:
    """EXIF's turn is done, transparency lies on white, grey and palettes become RGB."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    turned = normalize_image(encoded(Image.fromarray(sample_image(1, 64, 32)), "JPEG", exif=exif, quality=95))
    assert open_upload(turned[1], turned[0]).size == (32, 64)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    name, data = normalize_image(encoded(clear, "PNG"))
    assert open_upload(data, name).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "P", "1", "LA"):
        upload_id, stored = normalize_image(encoded(Image.new(mode, (8, 8)), "PNG"))
        assert open_upload(stored, upload_id).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a readable image"),
        (b"GIF89a", "not a readable image"),
        (encoded(Image.fromarray(sample_image(1)), "PNG")[:200], "not a readable image"),
        (encoded(Image.fromarray(sample_image(1)), "TIFF"), "not a readable image"),
        (b"\x00" * (MAX_BYTES + 1), "larger than"),
        (encoded(Image.new("1", (8001, 8000)), "PNG"), "more than 64000000 pixels"),
    ],
    ids=["empty", "header", "cut", "format", "bytes", "pixels"],
)
def test_what_is_no_safe_image_is_refused(data: bytes, said: str) -> None:
    """By content, whatever its name said; a bomb before it is unpacked."""
    with pytest.raises(InvalidRequest, match=said):
        normalize_image(data, field="init_image")


def test_a_changed_file_is_noticed() -> None:
    upload_id, _ = normalize_image(encoded(Image.fromarray(sample_image(1)), "PNG"))
    _, other = normalize_image(encoded(Image.fromarray(sample_image(2)), "PNG"))
    with pytest.raises(InvalidRequest, match="was changed"):
        open_upload(other, upload_id)


def test_images_are_scaled_to_cover_and_cut_evenly() -> None:
    """No distortion; a mask gets no shades between its values."""
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (0, 0, 50, 100))  # cut off
    image.paste("blue", (150, 0, 200, 100))
    assert set(fitted(image, 64, 64).resize((4, 4), Image.Resampling.NEAREST).getdata()) == {(255, 0, 0)}
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 20, 64))
    assert set(fitted(mask.convert("RGB"), 48, 48, mask=True).convert("L").getdata()) == {0, 255}
