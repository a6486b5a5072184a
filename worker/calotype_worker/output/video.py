"""Encodes frames as GIF and MP4 with their provenance inside, and reads them back.

A GIF carries the JSON as its comment extension (GIF89a, section 24), an MP4 as its `comment` metadata.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image, ImageSequence

from calotype_worker.output.audio import add_sound, write_sound
from calotype_worker.request import Audio

FRAMES_PER_SECOND = 8.0  # AnimateDiff is trained at this rate, and it suits a turntable
_GIF_CLOCK = 100  # GIF delays are in hundredths of a second,
_SHORTEST_DELAY = 2  # and browsers slow down delays of less than two
_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that this build of FFmpeg has
_X264_OPTIONS = {"crf": "17", "preset": "medium"}  # visually lossless
_BT709 = 1  # in FFmpeg's enumerations of color spaces, primaries and transfers
_LIMITED_RANGE = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """A video file's content."""

    frames: np.ndarray  # uint8 (F, H, W, 3)
    seconds: float  # all frames together
    provenance: Mapping[str, Any] = field(default_factory=dict)


def encode_gif(frames: np.ndarray, fps: float, provenance: Mapping[str, Any]) -> bytes:
    """An endless GIF of `frames`, uint8 (F, H, W, 3), with up to 256 colors a frame.

    Equal frames in a row become one that is shown longer. Above 50 frames per second it plays slower than requested.

    Raises:
        ValueError: no frames, or not of that shape and type.
    """
    _check(frames, fps)
    # Each frame lasts until the next is due, so that rounding to the clock never adds up.
    due = [round(index * _GIF_CLOCK / fps) for index in range(len(frames) + 1)]
    delays = [10 * max(_SHORTEST_DELAY, after - before) for before, after in itertools.pairwise(due)]  # ms
    images = [_paletted(Image.fromarray(frame)) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=delays,
        loop=0,
        comment=json.dumps(provenance, sort_keys=True).encode("ascii"),
    )
    return buffer.getvalue()


def read_gif(data: bytes) -> Video:
    """A GIF file's frames, and the metadata that `encode_gif` wrote."""
    with Image.open(io.BytesIO(data)) as image:
        comment = image.info.get("comment", b"")
        shown = [
            (np.asarray(frame.convert("RGB")), frame.info.get("duration", 0)) for frame in ImageSequence.Iterator(image)
        ]
    return Video(
        frames=np.stack([frame for frame, _ in shown]),
        seconds=sum(delay for _, delay in shown) / 1000,
        provenance=_parsed(comment.decode("utf-8", "replace")),
    )


def encode_mp4(frames: np.ndarray, fps: float, provenance: Mapping[str, Any], *, audio: Audio | None = None) -> bytes:
    """An MP4 of `frames`, uint8 (F, H, W, 3), with AAC if there is audio.

    Video is H.264 with 4:2:0 chroma in BT.709, which every browser plays.
    Odd sides are made even by repeating the last row or column. A build of FFmpeg without an H.264 encoder falls back
    to MPEG-4 part 2. H.264 is lossy, and x264 sometimes encodes the same frames with differences of a few levels.

    Raises:
        ValueError: no frames, or not of that shape and type.
    """
    _check(frames, fps)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    name = next(name for name in _ENCODERS if name in av.codecs_available)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        container.metadata["comment"] = json.dumps(provenance, sort_keys=True)
        stream = container.add_stream(
            name, rate=Fraction(fps).limit_denominator(1000), options=_X264_OPTIONS if name == "libx264" else {}
        )
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # x264's decisions depend on it
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        sound = None if audio is None else add_sound(container, audio)
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
        if sound is not None and audio is not None:
            write_sound(container, sound, audio)
    return buffer.getvalue()


def read_mp4(data: bytes) -> Video:
    """An MP4 file's frames, and the metadata that `encode_mp4` wrote."""
    with av.open(io.BytesIO(data), "r") as container:
        comment = container.metadata.get("comment", "")
        stream = container.streams.video[0]
        frames = [
            frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray() for frame in container.decode(stream)
        ]
        rate = stream.average_rate
    return Video(
        frames=np.stack(frames), seconds=float(len(frames) / rate) if rate else 0.0, provenance=_parsed(comment)
    )


def _paletted(image: Image.Image) -> Image.Image:
    """Reduce to 256 adapted colors with dithering, which keeps the mean color of smooth areas and avoids bands.

    With dithering, octree palettes are as good as median cut, and many times faster.
    """
    palette = image.quantize(256, method=Image.Quantize.FASTOCTREE)
    return image.quantize(256, palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _check(frames: np.ndarray, fps: float) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames) or frames.dtype != np.uint8:
        raise ValueError(f"frames should be uint8 (F, H, W, 3) and at least one, not {frames.dtype} {frames.shape}")
    if not fps > 0:
        raise ValueError(f"fps={fps}: should be above 0")


def _parsed(comment: str) -> dict[str, Any]:
    """The JSON object in a comment; empty for a file that is not ours."""
    try:
        found = json.loads(comment)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
