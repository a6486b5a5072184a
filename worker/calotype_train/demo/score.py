"""Scores a model folder: does plain diffusers, given held-out captions, draw what they say?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from calotype_train.demo.checker import look
from calotype_train.demo.scenes import held_out_captions


def load_pipeline(folder: Path) -> Any:
    """The folder as any user of diffusers would load it, in float32."""
    from diffusers import StableDiffusionPipeline  # noqa: PLC0415

    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: Any, captions: Sequence[str], *, steps: int, guidance: float, seed: int, rows: int = 16
) -> list[np.ndarray]:
    """One 128x128 picture a caption, uint8; picture i uses `seed + i`."""
    pictures: list[np.ndarray] = []
    for begin in range(0, len(captions), rows):
        chosen = list(captions[begin : begin + rows])
        generators = [torch.Generator().manual_seed(seed + begin + i) for i in range(len(chosen))]
        made = pipeline(
            chosen, num_inference_steps=steps, guidance_scale=guidance, generator=generators, width=128, height=128
        )
        pictures += [np.asarray(image) for image in made.images]
    return pictures


def score(
    folder: Path, *, count: int = 200, steps: int = 20, guidance: float = 5.0, seed: int = 7
) -> tuple[dict[str, float], list[tuple[str, np.ndarray, bool]]]:
    """Shares of pictures whose shape, colour, background and all three are right; and the pictures themselves."""
    wanted = held_out_captions(count)
    pictures = sample(load_pipeline(folder), [w[0] for w in wanted], steps=steps, guidance=guidance, seed=seed)
    right = {"shape": 0, "colour": 0, "background": 0, "all": 0}
    judged = []
    for (caption, shape, colour, background), picture in zip(wanted, pictures, strict=True):
        seen = look(picture)
        hits = {
            "shape": seen.shape == shape,
            "colour": seen.colour == colour,
            "background": seen.background == background,
        }
        hits["all"] = all(hits.values())
        for name, hit in hits.items():
            right[name] += hit
        judged.append((caption, picture, hits["all"]))
    return {name: hits / count for name, hits in right.items()} | {"pictures": float(count)}, judged


def sheet(pictures: Sequence[tuple[str, np.ndarray, bool]], *, columns: int = 8, scale: int = 1) -> Image.Image:
    """A contact sheet with captions; a red caption marks a picture the checker refused."""
    height, width = pictures[0][1].shape[:2]
    width, height, strip = width * scale, height * scale, 26
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (width + 6) + 6, rows * (height + strip + 6) + 6), (32, 32, 32))
    pen = ImageDraw.Draw(page)
    for number, (caption, picture, right) in enumerate(pictures):
        x, y = 6 + number % columns * (width + 6), 6 + number // columns * (height + strip + 6)
        page.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS), (x, y))
        words = caption.removesuffix(" background")
        half = words.rfind(" on ")
        colour = (230, 230, 230) if right else (255, 110, 110)
        pen.text((x, y + height + 1), words[:half] if half > 0 else words, fill=colour)
        pen.text((x, y + height + 12), words[half + 1 :] if half > 0 else "", fill=colour)
    return page
