"""`GenerationConfig`: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.config import (
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    GenerationConfig,
)
from calotype_shared.schema.enums import SamplerType
from calotype_shared.schema.presets import QUALITY_PRESETS, quality_preset


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt=None: field required; give it"),
        ({"width": 513}, r"width=513: .* use 512 or 520"),
        ({"height": 4}, r"height=4: .* use 8 or 16"),
        ({"width": 100_000}, r"width=100000: .* use at most 8192"),
        ({"num_inference_steps": 0}, r"num_inference_steps=0: .* use at least 1"),
        ({"num_inference_steps": 2.5}, r"num_inference_steps=2\.5"),
        ({"guidance_scale": math.nan}, r"guidance_scale=nan: .* use a finite number"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf"),
        ({"guidance_scale": -1}, r"guidance_scale=-1: .* use at least 0"),
        ({"seed": -1}, r"seed=-1: .* use at least 0"),
        ({"seed": MAX_SEED + 1}, "seed=9007199254740992"),
        ({"sampler": "fastest"}, r"sampler='fastest': .* use one of: ddpm, ddim"),
        ({"output_format": "tiff"}, "use one of: png, webp, jpeg"),
        ({"model": "/etc/passwd"}, "a registered name, not a path"),
        ({"model": "../secrets"}, "a registered name, not a path"),
        ({"prompt": "x" * 5000}, r"\(5002 characters\): .* shorten it to 4000 characters"),
        ({"prompt": "\ud800"}, "unicode"),
        ({"num_images": 0}, "num_images=0"),
        ({"stepz": 3}, r"stepz=3: .* use one of: prompt, negative_prompt"),
        ({"sampler": "lcm", "num_inference_steps": 80}, r"num_inference_steps=80: .* at most 50"),
    ],
    ids=lambda value: next(iter(value), "empty") if isinstance(value, dict) else "",
)
def test_bad_fields_are_named_with_value_and_remedy(fields: dict[str, Any], said: str) -> None:
    """One sentence a person can act on, not a dump of a validator's insides."""
    with pytest.raises(InvalidRequest, match=said) as caught:
        GenerationConfig.parse(({"prompt": "x"} if fields else {}) | fields)
    assert "pydantic" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from([*GenerationConfig.model_fields, "other"]), JSON, max_size=6))
def test_any_input_is_a_config_or_a_clear_refusal(fields: dict[str, Any]) -> None:
    """Whatever arrives, nothing but InvalidRequest comes out; what is taken survives the wire."""
    try:
        config = GenerationConfig.parse(fields)
    except InvalidRequest as error:
        assert error.field and error.remedy  # noqa: PT017, PT018 - either outcome is right
    else:
        again = GenerationConfig.model_validate_json(config.canonical_json())
        assert again == config
        assert again.digest() == config.digest()


def test_equal_configs_have_equal_digests_and_others_do_not() -> None:
    """However they were spelled; and every single field counts."""
    config = GenerationConfig(prompt="a", width=128, height=128, seed=1)
    assert config.digest() == GenerationConfig.parse({"seed": 1, "height": 128, "width": 128, "prompt": " a "}).digest()
    changes = {
        "prompt": "b",
        "negative_prompt": "c",
        "width": 136,
        "height": 136,
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
        "seed": 2,
        "sampler": SamplerType.EULER,
        "model": "other",
        "num_images": 2,
        "output_format": "webp",
        "init_image": "a" * 64,
        "mask_image": "b" * 64,
        "strength": 0.5,
        "loras": [{"name": "sketch"}],
        "controls": [{"name": "outline", "image": "c" * 64}],
        "refiner": {"model": "other"},
        "ensemble": ["other"],
        "preview_every": 5,
        "num_frames": 8,
        "fps": 12.0,
        "audio_seconds": 2.5,
        "images": ["d" * 64],
        "control_image": "e" * 64,
        "parameters": {"clip_skip": 1},
    }
    assert set(changes) == set(GenerationConfig.model_fields), "a new field must be tried here too"
    with_image = {name: {"init_image": "d" * 64} for name in ("mask_image", "strength")}
    others = {
        GenerationConfig.parse(config.model_dump() | with_image.get(name, {}) | {name: value}).digest()
        for name, value in changes.items()
    }
    assert len(others | {config.digest()}) == len(changes) + 1


def test_nothing_is_lost_in_the_canonical_spelling() -> None:
    """Unused parts are left out; a strength of 0 is not unused."""
    config = GenerationConfig(prompt="a", init_image="a" * 64, strength=0.0)
    assert GenerationConfig.model_validate_json(config.canonical_json()) == config
    assert "loras" not in config.canonical_json()


def test_configs_are_frozen_and_hashable() -> None:
    """They are values: shared between threads and used as keys."""
    config = GenerationConfig(prompt="x", seed=1)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 2  # type: ignore[misc]
    assert len({config, GenerationConfig(prompt="x", seed=1)}) == 1


def test_the_presets_are_the_founding_documents() -> None:
    """20 steps at 7.0, 50 at 7.5, 100 at 8.0; others are refused by name."""
    assert {name: tuple(preset.values()) for name, preset in QUALITY_PRESETS.items()} == {
        "fast": (20, 7.0),
        "balanced": (50, 7.5),
        "high": (100, 8.0),
    }
    with pytest.raises(InvalidRequest, match="quality='best'"):
        quality_preset("best")


def test_the_wire_format_is_plain_json() -> None:
    """Other languages must be able to read and write it."""
    config = GenerationConfig(prompt="ünïcode ✓", seed=MAX_SEED, width=128, height=128)
    assert json.loads(config.canonical_json())["seed"] == MAX_SEED
    assert len(config.prompt) < MAX_PROMPT_CHARACTERS
