"""Encoded images say how to make them again, in every format."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from calotype_shared.schema import a1111
from calotype_shared.schema.enums import OutputFormat, SamplerType
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_worker.output.image import encode_image, parameters_line, read_provenance

CONFIG = ResolvedConfig(
    prompt="a lake — «serene» ✓",
    negative_prompt="blurry",
    width=64,
    height=48,
    seed=0,
    sampler="euler_a",
    guidance_scale=7.0,
)
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("output_format", [OutputFormat.PNG, OutputFormat.WEBP, OutputFormat.JPEG])
def test_provenance_comes_back_out(output_format: OutputFormat) -> None:
    """Unicode and all; PNG keeps every pixel."""
    provenance = {"config": CONFIG.model_dump(mode="json"), "seed": 2**53 - 1}
    data = encode_image(PIXELS, output_format, provenance)
    assert read_provenance(data) == provenance
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == output_format.value.upper()
        assert image.size == (64, 48)
        if output_format is OutputFormat.PNG:
            assert np.array_equal(np.asarray(image), PIXELS)


def test_other_tools_can_read_the_settings() -> None:
    """The `parameters` chunk in AUTOMATIC1111's spelling."""
    line = parameters_line(CONFIG, seed=5, steps=20)
    assert line == (
        "a lake — «serene» ✓\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x48, Model: demo"
    )
    with Image.open(io.BytesIO(encode_image(PIXELS, OutputFormat.PNG, {"parameters": line}))) as image:
        assert image.text["parameters"] == line  # type: ignore[attr-defined]


def test_every_sampler_has_a_name_there() -> None:
    """A new sampler must be given one."""
    assert set(a1111.NAMES) == set(SamplerType)


def test_a_strangers_image_has_no_provenance() -> None:
    """Rather than an error."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    assert read_provenance(buffer.getvalue()) == {}
