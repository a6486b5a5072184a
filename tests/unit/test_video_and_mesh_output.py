"""Files of videos and meshes: frames, colors, rate and provenance come back as they went in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from calotype_worker.output.mesh import encode_ply, read_provenance
from calotype_worker.output.video import encode_gif, encode_mp4, read_gif, read_mp4
from calotype_worker.request import Mesh
from tests.models import sample_image

PROVENANCE = {"config": {"prompt": 'a "snow\u00adman" ☃\n' + "very, " * 600, "seed": 3}, "steps_taken": 7}


def moving(width: int, height: int, frames: int = 6) -> np.ndarray:
    """A smooth image that drifts: uint8 (F, H, W, 3)."""
    return np.stack([np.roll(sample_image(5, width, height), 2 * index, axis=1) for index in range(frames)])


def test_a_gif_keeps_frames_pace_and_provenance() -> None:
    """Colors within what 256 of them allow, the whole time as asked, the JSON whole."""
    frames = moving(48, 40)
    data = encode_gif(frames, 12.0, PROVENANCE)
    found = read_gif(data)
    assert found.frames.shape == frames.shape
    assert found.seconds == pytest.approx(6 / 12, abs=0.01)
    assert found.provenance == PROVENANCE
    assert np.abs(found.frames.astype(int) - frames).mean() < 8
    assert np.abs(found.frames.astype(int).mean(axis=(1, 2)) - frames.mean(axis=(1, 2))).max() < 2
    assert np.abs(np.roll(found.frames, 1, axis=0).astype(int) - frames).mean() > 12  # in another order: far off
    assert encode_gif(frames, 12.0, PROVENANCE) == data


@pytest.mark.parametrize(("width", "height"), [(48, 40), (47, 39)])
def test_an_mp4_keeps_frames_pace_and_provenance(width: int, height: int) -> None:
    """Also with odd sides, which are made even."""
    frames = moving(width, height)
    found = read_mp4(encode_mp4(frames, 12.5, PROVENANCE))
    assert found.frames.shape == (6, 40, 48, 3)
    assert found.seconds == pytest.approx(6 / 12.5)
    assert found.provenance == PROVENANCE
    cut = found.frames[:, :height, :width].astype(int)
    assert np.abs(cut - frames).mean() < 8
    assert np.abs(np.roll(cut, 1, axis=0) - frames).mean() > 12


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_an_mp4_keeps_colors(color: tuple[int, int, int]) -> None:
    """The conversion and what the file says of it agree: a wrong matrix shifts red and green by tens of levels."""
    frames = np.broadcast_to(np.array(color, np.uint8), (3, 32, 32, 3))
    assert np.abs(read_mp4(encode_mp4(frames, 8.0, {})).frames.astype(int) - frames).max() <= 3


def test_an_mp4_is_what_browsers_play() -> None:
    """H.264 with 4:2:0 chroma, and its colors described."""
    import io

    import av

    with av.open(io.BytesIO(encode_mp4(moving(48, 40), 8.0, {})), "r") as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (int(context.colorspace), int(context.color_range)) == (1, 1)


def test_other_files_have_no_provenance() -> None:
    """A comment of another program is not an error."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sample_image(1)).quantize(16).save(buffer, "GIF", comment=b"made with care")
    assert read_gif(buffer.getvalue()).provenance == {}


@pytest.mark.parametrize("encode", [encode_gif, encode_mp4])
def test_what_is_no_video_is_refused(encode: Callable[..., bytes]) -> None:
    """No frames, a single image, other numbers than bytes, no pace."""
    for frames, fps in ((moving(8, 8)[:0], 8.0), (moving(8, 8)[0], 8.0), (moving(8, 8) / 255, 8.0), (moving(8, 8), 0)):
        with pytest.raises(ValueError, match="should be"):
            encode(frames, fps, {})


def test_a_ply_comes_back_as_it_was() -> None:
    """Read by a parser that follows the header alone."""
    random = np.random.default_rng(1)
    mesh = Mesh(
        vertices=random.standard_normal((7, 3)).astype(np.float32),
        faces=random.integers(0, 7, (5, 3)),
        colors=random.integers(0, 256, (7, 3), dtype=np.uint8),
    )
    data = encode_ply(mesh, PROVENANCE)
    elements, comments = parse_ply(data)
    vertices, faces = elements["vertex"], elements["face"]
    assert np.array_equal([[v["x"], v["y"], v["z"]] for v in vertices], mesh.vertices)
    assert np.array_equal([[v["red"], v["green"], v["blue"]] for v in vertices], mesh.colors)
    assert np.array_equal([face["vertex_indices"] for face in faces], mesh.faces)
    assert read_provenance(data) == PROVENANCE
    assert max(map(len, comments)) < 256  # readers with small buffers
    assert read_provenance(encode_ply(mesh, {})) == {}


def parse_ply(data: bytes) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Elements by name, and the comments, of a binary little-endian PLY. Reads types from the header."""
    types = {"float": "<f4", "int": "<i4", "uchar": "u1"}
    header, body = data.split(b"end_header\n", 1)
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    layout: list[tuple[str, int, list[list[str]]]] = []
    comments = []
    for line in lines[2:]:
        words = line.split(" ")
        if words[0] == "comment":
            comments.append(line)
        elif words[0] == "element":
            layout.append((words[1], int(words[2]), []))
        else:
            layout[-1][2].append(words[1:])
    position = 0

    def take(kind: str, count: int = 1) -> Any:
        nonlocal position
        values = np.frombuffer(body, types[kind], count, position)
        position += values.nbytes
        return values

    found: dict[str, list[dict[str, Any]]] = {}
    for name, count, properties in layout:
        found[name] = [
            {
                words[-1]: take(words[2], int(take(words[1])[0])) if words[0] == "list" else take(words[0])[0]
                for words in properties
            }
            for _ in range(count)
        ]
    assert position == len(body)
    return found, comments
