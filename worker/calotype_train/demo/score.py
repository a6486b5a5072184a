"""Scores a model folder: do images that plain diffusers generates from held-out captions match them?"""

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
    """One 128x128 image a caption, uint8; image i uses `seed + i`."""
    images: list[np.ndarray] = []
    for begin in range(0, len(captions), rows):
        chosen = list(captions[begin : begin + rows])
        generators = [torch.Generator().manual_seed(seed + begin + i) for i in range(len(chosen))]
        made = pipeline(
            chosen, num_inference_steps=steps, guidance_scale=guidance, generator=generators, width=128, height=128
        )
        images += [np.asarray(image) for image in made.images]
    return images


def score(
    folder: Path, *, count: int = 200, steps: int = 20, guidance: float = 5.0, seed: int = 7
) -> tuple[dict[str, float], list[tuple[str, np.ndarray, bool]]]:
    """Shares of images with the correct shape, color, background, and all three; and the images."""
    wanted = held_out_captions(count)
    images = sample(load_pipeline(folder), [w[0] for w in wanted], steps=steps, guidance=guidance, seed=seed)
    right = {"shape": 0, "color": 0, "background": 0, "all": 0}
    judged = []
    for (caption, shape, color, background), image in zip(wanted, images, strict=True):
        seen = look(image)
        hits = {
            "shape": seen.shape == shape,
            "color": seen.color == color,
            "background": seen.background == background,
        }
        hits["all"] = all(hits.values())
        for name, hit in hits.items():
            right[name] += hit
        judged.append((caption, image, hits["all"]))
    return {name: hits / count for name, hits in right.items()} | {"images": float(count)}, judged


def sheet(images: Sequence[tuple[str, np.ndarray, bool]], *, columns: int = 8, scale: int = 1) -> Image.Image:
    """A contact sheet with captions; a red caption marks an image the checker refused."""
    height, width = images[0][1].shape[:2]
    width, height, strip = width * scale, height * scale, 26
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + 6) + 6, rows * (height + strip + 6) + 6), (32, 32, 32))
    pen = ImageDraw.Draw(page)
    for number, (caption, image, right) in enumerate(images):
        x, y = 6 + number % columns * (width + 6), 6 + number // columns * (height + strip + 6)
        page.paste(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS), (x, y))
        words = caption.removesuffix(" background")
        half = words.rfind(" on ")
        color = (230, 230, 230) if right else (255, 110, 110)
        pen.text((x, y + height + 1), words[:half] if half > 0 else words, fill=color)
        pen.text((x, y + height + 12), words[half + 1 :] if half > 0 else "", fill=color)
    return page
