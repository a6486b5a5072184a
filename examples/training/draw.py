"""Draw training images for the demo model, with their metadata.jsonl.

python examples/training/draw.py sticker --out FOLDER --count 1200    # a style, for a LoRA
python examples/training/draw.py neon --out FOLDER --count 1200       # another
python examples/training/draw.py lime --out FOLDER --count 200        # a color it has no word for: <lime>
python examples/training/draw.py outline --out FOLDER --count 3000    # outlines, for a ControlNet
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from calotype_train.demo.scenes import COLORS, SHAPES, Item, Scene, draw, random_scene

SIZES = {(128, 128): 0.7, (160, 96): 0.15, (96, 160): 0.15}  # the demo model's own, and how often each
SCALE = 4  # drawn so many times larger, then averaged
LIME = (150, 215, 60)

Mask = np.ndarray  # bool (H, W), at SCALE
Drawing = tuple[Image.Image, str, Image.Image | None]  # image, caption, control image


def sticker(rng: random.Random, width: int, height: int) -> Drawing:
    """A thick white rim around every shape, and its black shadow: colors that the demo model's autoencoder knows."""
    scene = random_scene(rng, width=width, height=height)
    canvas = _ground(scene.background, width, height)
    rim, fall = 6 * SCALE, 5 * SCALE
    masks = [(item.color, mask_of(item, width, height)) for item in scene.items]
    for _, mask in masks:
        canvas[_shifted(_grown(mask, rim), fall)] = COLORS["black"]
    for _, mask in masks:
        canvas[_grown(mask, rim)] = COLORS["white"]
    for color, mask in masks:
        canvas[mask] = COLORS[color]
    return _finished(canvas, width, height), scene.caption, None


def neon(rng: random.Random, width: int, height: int) -> Drawing:
    """Glowing outlines on a dark ground that keeps a tint of its color."""
    scene = random_scene(rng, width=width, height=height)
    canvas = _ground(scene.background, width, height) * 0.25
    for item in scene.items:
        mask, color = mask_of(item, width, height), np.asarray(COLORS[item.color], dtype=np.float64)
        line = mask & ~_shrunk(mask, 5 * SCALE)
        glow = np.asarray(_as_image(line).filter(ImageFilter.GaussianBlur(5 * SCALE))) / 255
        canvas += (color - canvas) * np.clip(glow * 1.5, 0, 0.7)[..., None]
        canvas[line] = color * 0.85 + 0.15 * 255
    return _finished(canvas, width, height), scene.caption, None


def lime(rng: random.Random, width: int, height: int) -> Drawing:
    """One shape in a color between green and yellow, for which the demo model has no word."""
    scene = random_scene(rng, width=width, height=height)
    while len(scene.items) != 1 or scene.background in ("green", "yellow"):
        scene = random_scene(rng, width=width, height=height)
    [item] = scene.items
    canvas = _ground(scene.background, width, height)
    canvas[mask_of(item, width, height)] = LIME
    words = scene.caption.split()
    words[words.index(item.color)] = "<lime>"
    return _finished(canvas, width, height), " ".join(words).replace("an <lime>", "a <lime>"), None


def outline(rng: random.Random, width: int, height: int) -> Drawing:
    """A shape anywhere, of any size and turned by any angle; the control image is its outline, white on black."""
    color, background = rng.sample([*COLORS], 2)
    item, turn = free_item(rng, width, height, shape=rng.choice(SHAPES), color=color)
    mask = mask_of(item, width, height, turn)
    canvas = _ground(background, width, height)
    canvas[mask] = COLORS[color]
    article = "an" if color[0] in "aeiou" else "a"
    ground = "an" if background[0] in "aeiou" else "a"
    caption = f"{article} {color} {item.shape} on {ground} {background} background"
    return _finished(canvas, width, height), caption, outline_of(mask)


def free_item(rng: random.Random, width: int, height: int, *, shape: str, color: str) -> tuple[Item, float]:
    """An item that may reach over the image's edge, and by how many degrees it is turned: half are not."""
    reach_x, reach_y = 0.22 * width / min(width, height), 0.22 * height / min(width, height)
    item = Item(
        shape=shape,
        color=color,
        x=rng.uniform(-reach_x, reach_x),
        y=rng.uniform(-reach_y, reach_y),
        radius=rng.uniform(0.16, 0.42),
    )
    return item, rng.choice([0.0, rng.uniform(-180, 180)])


def outline_of(mask: Mask) -> Image.Image:
    """The mask's edge, two pixels wide."""
    edge = _grown(mask, SCALE) & ~_shrunk(mask, SCALE)
    size = (mask.shape[1] // SCALE, mask.shape[0] // SCALE)
    return _as_image(edge).resize(size, Image.Resampling.BOX).convert("RGB")


STYLES: dict[str, Callable[[random.Random, int, int], Drawing]] = {
    "sticker": sticker,
    "neon": neon,
    "lime": lime,
    "outline": outline,
}


def _ground(color: str, width: int, height: int) -> np.ndarray:
    """float64 (H, W, 3) at SCALE, of one color."""
    return np.tile(np.asarray(COLORS[color], dtype=np.float64), (height * SCALE, width * SCALE, 1))


def mask_of(item: Item, width: int, height: int, turn: float = 0.0) -> Mask:
    """The item's pixels, turned about its centre by `turn` degrees."""
    white = Item(shape=item.shape, color="white", x=item.x, y=item.y, radius=item.radius, outlined=item.outlined)
    scene = Scene(background="black", items=(white,), caption="")
    side = min(width, height) * SCALE
    centre = (width * SCALE / 2 + item.x * side, height * SCALE / 2 + item.y * side)
    image = draw(scene, width=width * SCALE, height=height * SCALE, rng=random.Random(0)).convert("L")
    return np.asarray(image.rotate(turn, center=centre)) > 127


def _grown(mask: Mask, pixels: int) -> Mask:
    """With everything nearer than so many pixels: a disc, approximated by a blurred edge's own distance."""
    return _distance(mask) <= pixels


def _shrunk(mask: Mask, pixels: int) -> Mask:
    return ~_grown(~mask, pixels)


def _distance(mask: Mask) -> np.ndarray:
    """(H, W) distance in pixels to the mask, by 3-4 chamfer passes along rows and columns."""
    far = float(sum(mask.shape))
    distance = np.where(mask, 0.0, far)
    for flipped in (False, True):
        view = distance[::-1, ::-1] if flipped else distance
        for row in range(view.shape[0]):
            if row:
                above = np.pad(view[row - 1], 1, constant_values=far)
                view[row] = np.minimum.reduce(
                    [view[row], above[1:-1] + 1, above[:-2] + math.sqrt(2), above[2:] + math.sqrt(2)]
                )
            steps = np.arange(view.shape[1])
            view[row] = np.minimum.accumulate(view[row] - steps) + steps
            view[row] = (np.minimum.accumulate((view[row] + steps)[::-1]))[::-1] - steps
    return distance


def _shifted(mask: Mask, pixels: int) -> Mask:
    """Moved right and down."""
    moved = np.zeros_like(mask)
    moved[pixels:, pixels:] = mask[:-pixels, :-pixels]
    return moved


def _as_image(mask: Mask) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def _finished(canvas: np.ndarray, width: int, height: int) -> Image.Image:
    pixels = canvas.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", choices=STYLES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    with (options.out / "metadata.jsonl").open("w") as metadata:
        for number in range(options.count):
            [(width, height)] = rng.choices([*SIZES], weights=[*SIZES.values()])
            image, caption, control = STYLES[options.style](rng, width, height)
            entry = {"file_name": f"{number:05d}.png", "text": caption}
            image.save(options.out / entry["file_name"])
            if control is not None:
                entry["conditioning_file_name"] = f"{number:05d}-control.png"
                control.save(options.out / entry["conditioning_file_name"])
            metadata.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
