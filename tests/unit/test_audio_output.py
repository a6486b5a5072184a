"""Files of sound: samples, rate and provenance come back as they went in, alone and beside frames."""

from __future__ import annotations

import numpy as np
import pytest

from calotype_shared.errors import GenerationFailed
from calotype_shared.schema.enums import OutputFormat
from calotype_worker.output.audio import encode_audio, read_audio
from calotype_worker.output.video import encode_mp4, read_mp4
from calotype_worker.request import Audio

PROVENANCE = {"config": {"prompt": 'a "wave" ☃' + ", loud" * 300, "seed": 3}, "steps_taken": 7}


def tone(channels: int, *, rate: int = 16_000, seconds: float = 0.5) -> Audio:
    """A sine of another pitch on each channel."""
    at = np.arange(int(rate * seconds)) / rate
    waves = [0.5 * np.sin(2 * np.pi * 220 * (1 + channel) * at) for channel in range(channels)]
    return Audio(samples=np.stack(waves).astype(np.float32), rate=rate)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("output_format", [OutputFormat.WAV, OutputFormat.FLAC])
def test_sound_comes_back(output_format: OutputFormat, channels: int) -> None:
    """To within the rounding of 16 bits, at its rate, with its JSON whole."""
    sound = tone(channels)
    audio, provenance = read_audio(encode_audio(sound, output_format, PROVENANCE))
    assert audio.rate == sound.rate
    assert audio.samples.shape == sound.samples.shape
    assert np.abs(audio.samples - sound.samples).max() <= 2 / 32768
    assert provenance == PROVENANCE


def test_loud_sound_is_clipped() -> None:
    """Beyond full scale it stays at full scale, and does not wrap around."""
    loud = Audio(samples=np.full((1, 100), 3.0, np.float32), rate=8_000)
    audio, _ = read_audio(encode_audio(loud, OutputFormat.WAV, {}))
    assert audio.samples.min() > 0.99


def test_nothing_to_write() -> None:
    """No sound, and more channels than a file has, are refused in words."""
    with pytest.raises(GenerationFailed, match="no sound"):
        encode_audio(None, OutputFormat.WAV, {})
    with pytest.raises(GenerationFailed, match="3 channels"):
        encode_audio(tone(3), OutputFormat.FLAC, {})


@pytest.mark.parametrize("rate", [16_000, 18_000])
def test_a_video_with_sound(rate: int) -> None:
    """Frames and provenance are those of a silent video, and the sound is as long and as loud as it was."""
    frames = np.zeros((8, 32, 32, 3), np.uint8)
    data = encode_mp4(frames, 8.0, PROVENANCE, audio=tone(2, rate=rate, seconds=1.0))
    video = read_mp4(data)
    assert video.frames.shape == frames.shape
    assert video.provenance == PROVENANCE
    audio, _ = read_audio(data)
    assert abs(audio.samples.shape[1] / audio.rate - 1.0) < 0.1
    middle = audio.samples[:, audio.samples.shape[1] // 4 : -audio.samples.shape[1] // 4]
    assert 0.4 < np.abs(middle).max() < 0.6
