"""The adapters that come with the demo model do what their README says, in plain diffusers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calotype_worker.models import demo_folder

ADAPTERS = demo_folder().parent / "adapters"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "training"
PROMPTS = [
    "a red circle on a blue background",
    "a green heart on a pink background",
    "a cyan star on a brown background",
]


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts that measured them import one another, as scripts do."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for name in ("compare", "draw"):
        sys.modules.pop(name, None)


def pixels(pipeline: Any, prompts: list[str], **options: Any) -> list[np.ndarray]:
    from compare import paint

    return [np.asarray(image) for image in paint(pipeline, prompts, **options)]


@pytest.mark.parametrize(("name", "least"), [("sticker", 0.015), ("neon", 0.5)])
def test_a_style_shows(name: str, least: float) -> None:
    """A sticker's rim is white, a neon's night is dark; the plain images are neither."""
    from compare import load

    def share(images: list[np.ndarray]) -> float:
        if name == "sticker":
            return float(np.mean([(p.min(-1) > 215).mean() for p in images]))
        return float(np.mean([(p.max(-1) < 110).mean() for p in images]))

    pipeline = load()
    assert share(pixels(pipeline, PROMPTS)) < 0.4 * least
    pipeline.load_lora_weights(str(ADAPTERS), weight_name=f"{name}.safetensors")
    assert share(pixels(pipeline, PROMPTS)) > least


def test_the_new_word_is_its_color() -> None:
    """Nearer to what it was taught than green and yellow are, on shapes and grounds of any kind."""
    from compare import load, median_color
    from draw import LIME

    pipeline = load()
    pipeline.load_textual_inversion(str(ADAPTERS / "lime.safetensors"))
    distance = {}
    for word in ("green", "yellow", "<lime>"):
        made = pixels(pipeline, [f"a {word} circle on a blue background", f"a {word} heart on a pink background"])
        distance[word] = np.mean([np.linalg.norm(median_color(image) - LIME) for image in made])
    assert distance["<lime>"] < 0.85 * min(distance["green"], distance["yellow"])


def test_the_outline_is_followed() -> None:
    """Shapes turned and moved as the model never draws them by itself."""
    from compare import SIDE, load, overlap
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from draw import SCALE, free_item, mask_of, outline_of

    rng = random.Random(5)
    masks = [mask_of(*_only(free_item(rng, SIDE, SIDE, shape=s, color="red"))) for s in ("heart", "square", "star")]
    prompts = [f"a red {shape} on a white background" for shape in ("heart", "square", "star")]
    net = ControlNetModel.from_pretrained(str(ADAPTERS / "outline"), torch_dtype=torch.float32, use_safetensors=True)
    controlled = load(StableDiffusionControlNetPipeline, controlnet=net)
    shares = []
    for made in (pixels(load(), prompts), pixels(controlled, prompts, image=[outline_of(mask) for mask in masks])):
        inside = [mask[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE] for mask in masks]
        shares.append(np.mean([overlap(image, mask) for image, mask in zip(made, inside, strict=True)]))
    assert shares[1] > max(0.6, shares[0] + 0.2)


def _only(item_and_turn: tuple[Any, float]) -> tuple[Any, int, int, float]:
    item, turn = item_and_turn
    return item, 128, 128, turn
