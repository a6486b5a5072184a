"""The demo model's scenes and the checker that scores its images."""

from __future__ import annotations

import random

import numpy as np

from calotype_train.demo.checker import look
from calotype_train.demo.scenes import (
    COLORS,
    SHAPES,
    Item,
    Scene,
    draw,
    held_out_captions,
    random_scene,
)
from calotype_train.demo.tokenizer import POSITIONS, build_tokenizer


def drawn(shape: str, color: str, background: str, *, radius: float = 0.25, seed: int = 0) -> np.ndarray:
    scene = Scene(
        background=background, items=(Item(shape=shape, color=color, x=0.0, y=0.0, radius=radius),), caption=""
    )
    return np.asarray(draw(scene, width=128, height=128, rng=random.Random(seed)))


def test_the_checker_reads_what_was_drawn() -> None:
    """Every shape, color and size on random backgrounds: a score below 100% is then the model's fault."""
    rng = random.Random(1)
    for shape in SHAPES:
        for color in COLORS:
            background = rng.choice([name for name in COLORS if name != color])
            radius = rng.choice([0.15, 0.22, 0.33])
            seen = look(drawn(shape, color, background, radius=radius))
            assert (seen.shape, seen.color, seen.background) == (shape, color, background)


def test_the_checker_catches_what_is_wrong() -> None:
    """An empty image, noise, and another shape, color or background."""
    assert look(np.full((128, 128, 3), 90, dtype=np.uint8)).shape is None
    seen = look(drawn("ring", "red", "white"))
    assert (seen.shape, seen.color, seen.background) == ("ring", "red", "white"), "which is no circle"
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    seen = look(noise)
    assert seen.color == seen.background, "which no caption asks for, so noise never scores"


def test_training_never_sees_a_held_out_combination() -> None:
    """Or the score would measure memory."""
    rng = random.Random(2)
    seen = {
        (item.shape, item.color, scene.background)
        for scene in (random_scene(rng, width=128, height=128) for _ in range(4000))
        for item in scene.items
    }
    held_out = {(shape, color, background) for _, shape, color, background in held_out_captions(500)}
    assert len(held_out) > 60
    assert not seen & held_out


def test_every_caption_fits_the_text_encoder_and_words_are_whole() -> None:
    """Truncated captions would teach the wrong thing; a color in pieces would be harder to learn."""
    tokenizer = build_tokenizer(captions=3000)
    rng = random.Random(3)
    lengths = [len(tokenizer(random_scene(rng, width=160, height=96).caption).input_ids) for _ in range(500)]
    assert max(lengths) <= POSITIONS
    assert len(tokenizer("a red star on a blue background").input_ids) == 9
    assert tokenizer.decode(tokenizer("zebra!").input_ids, skip_special_tokens=True).replace(" ", "") == "zebra!"
