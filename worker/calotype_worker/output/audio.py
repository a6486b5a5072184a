"""Encodes sound as WAV and FLAC with its provenance inside, reads it back, and adds it to videos.

A FLAC carries the JSON as a Vorbis comment, a WAV as the comment of its INFO list.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import av
import numpy as np

from calotype_shared.errors import GenerationFailed
from calotype_shared.schema.enums import OutputFormat
from calotype_worker.request import Audio

_LAYOUTS = {1: "mono", 2: "stereo"}
_AAC_RATES = (48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)
_PIECE = 1024  # samples of an AAC frame


def encode_audio(audio: Audio | None, output_format: OutputFormat, provenance: Mapping[str, Any]) -> bytes:
    """A file of 16-bit samples.

    Raises:
        GenerationFailed: there is no sound, or it has more than two channels.
    """
    if audio is None or not audio.samples.size:
        raise GenerationFailed("there is no sound to write; use another output_format")
    if audio.samples.shape[0] not in _LAYOUTS:
        raise GenerationFailed(f"the sound has {audio.samples.shape[0]} channels; one or two can be written")
    layout = _LAYOUTS[audio.samples.shape[0]]
    codec = "pcm_s16le" if output_format is OutputFormat.WAV else "flac"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=output_format.value) as container:
        container.metadata["comment"] = json.dumps(provenance, sort_keys=True)
        stream = container.add_stream(codec, rate=audio.rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        levels = (audio.samples.clip(-1, 1) * 32767).round().astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(levels.T.reshape(1, -1)), format="s16", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = audio.rate, 0, Fraction(1, audio.rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def read_audio(data: bytes) -> tuple[Audio, dict[str, Any]]:
    """The sound of a file, also of one with frames, and its provenance."""
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.audio[0]
        comment = container.metadata.get("comment", "") or stream.metadata.get("comment", "")
        channels, rate = stream.codec_context.channels, stream.codec_context.sample_rate
        pieces = []
        for frame in container.decode(stream):
            values = frame.to_ndarray()
            if values.shape[0] != channels:  # interleaved
                values = values.reshape(-1, channels).T
            pieces.append(values / 32768 if values.dtype == np.int16 else values)
    samples = np.concatenate(pieces, axis=1).astype(np.float32)
    try:
        found = json.loads(comment)
    except ValueError:
        found = {}
    return Audio(samples=samples, rate=rate), found if isinstance(found, dict) else {}


def add_sound(container: Any, audio: Audio) -> Any:
    """A stream for the sound of a video; it must be added before anything is written."""
    return container.add_stream("aac", rate=_aac_rate(audio), layout=_LAYOUTS[min(2, audio.samples.shape[0])])


def write_sound(container: Any, stream: Any, audio: Audio) -> None:
    """All of the sound, at most its first two channels."""
    rate = _aac_rate(audio)
    samples = audio.samples[:2].clip(-1, 1)
    if rate != audio.rate:
        count = int(samples.shape[1] * rate / audio.rate)
        at = np.arange(count) * (audio.rate / rate)
        samples = np.stack([np.interp(at, np.arange(samples.shape[1]), channel) for channel in samples])
    for start in range(0, samples.shape[1], _PIECE):
        piece = np.ascontiguousarray(samples[:, start : start + _PIECE], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=_LAYOUTS[len(piece)])
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _aac_rate(audio: Audio) -> int:
    return min(_AAC_RATES, key=lambda rate: abs(rate - audio.rate))
