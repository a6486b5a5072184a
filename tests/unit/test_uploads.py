"""Images that go in: what is kept of them, and what is refused."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from calotype_shared.errors import InvalidRequest
from calotype_shared.storage.images import MAX_BYTES, _Pixels, decoding, fitted, normalize_image, open_upload
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
    name, data = normalize_image(encoded(Image.new("RGBA", (8, 8), (255, 255, 255, 0)), "PNG"), field="mask_image")
    assert open_upload(data, name).getpixel((0, 0)) == (0, 0, 0), "of a mask, what is transparent is kept"
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
        (encoded(Image.new("1", (5001, 5000)), "PNG"), "more than 25000000 pixels"),
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


def test_deep_and_odd_images_are_what_people_see() -> None:
    """16 bits are scaled, not clipped; CMYK becomes RGB; of a phone's file with several images the first one counts."""
    grey = np.full((8, 8), 0x8000, np.uint16)
    deep, _ = as_stored(encoded(Image.fromarray(grey), "PNG"))
    assert deep.getpixel((0, 0)) in {(127, 127, 127), (128, 128, 128)}
    cmyk, _ = as_stored(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = np.asarray(cmyk)[0, 0]
    assert red > 200
    assert max(green, blue) < 60
    photo, depth = Image.new("RGB", (16, 8), "blue"), Image.new("RGB", (4, 4), "white")
    several, _ = as_stored(encoded(photo, "MPO", save_all=True, append_images=[depth]))
    assert several.size == (16, 8)
    assert np.asarray(several)[0, 0, 2] > 200


def as_stored(data: bytes) -> tuple[Image.Image, str]:
    upload_id, stored = normalize_image(data)
    return open_upload(stored, upload_id), upload_id


_PEAK = """
import io, resource, sys
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from calotype_shared.memory import return_large_blocks
from calotype_shared.storage.images import normalize_image
return_large_blocks()
image = Image.new("RGBA", (5000, 5000), (255, 0, 0, 128))
buffer = io.BytesIO()
image.save(buffer, "PNG")
del image
Image.new("RGB", (8, 8)).save(io.BytesIO(), "PNG")
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
before = peak()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(normalize_image, [buffer.getvalue()] * 4))
print((peak() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_images_at_once_take_the_memory_of_one() -> None:
    """MiB above the idle process, for four images of the largest size, transparent, in four threads."""
    ran = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 256


def test_pixels_at_one_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another image is not opened before there is room for it."""
    monkeypatch.setattr("calotype_shared.storage.images._pixels", _Pixels(100))
    data = encoded(Image.new("RGB", (8, 8)), "PNG")
    opened = threading.Event()

    def second() -> None:
        with decoding(data):
            opened.set()

    with decoding(data):
        thread = threading.Thread(target=second)
        thread.start()
        assert not opened.wait(0.2)
    assert opened.wait(30)
    thread.join()
