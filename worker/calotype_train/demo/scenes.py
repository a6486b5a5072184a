"""Captioned scenes, drawn as needed: colored shapes on a colored background. The demo model's whole world."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (40, 160, 70),
    "cyan": (60, 205, 220),
    "blue": (45, 80, 215),
    "purple": (135, 55, 175),
    "pink": (245, 140, 185),
    "brown": (125, 75, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
SIZES: dict[str, tuple[float, float]] = {"small": (0.13, 0.16), "": (0.19, 0.25), "large": (0.30, 0.36)}
PLACES: dict[str, tuple[float, float]] = {
    "in the top left corner": (-1, -1),
    "at the top": (0, -1),
    "in the top right corner": (1, -1),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "in the bottom left corner": (-1, 1),
    "at the bottom": (0, 1),
    "in the bottom right corner": (1, 1),
}
RELATIONS: dict[str, tuple[float, float]] = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
COUNTS = {2: "two", 3: "three", 4: "four"}
_JITTER = 7  # levels a channel, so that a color is a region and not a point
_SUPERSAMPLE = 4
_HELD_OUT_SHARE = 12  # one of this many (shape, color, background) combinations is excluded from training


@dataclass(frozen=True, kw_only=True)
class Item:
    shape: str
    color: str
    x: float  # centre and radius as shares of the image's shorter side, from its centre
    y: float
    radius: float
    outlined: bool = False


@dataclass(frozen=True, kw_only=True)
class Scene:
    background: str
    items: tuple[Item, ...]
    caption: str

    @property
    def held_out(self) -> bool:
        return any(is_held_out(item.shape, item.color, self.background) for item in self.items)


def is_held_out(shape: str, color: str, background: str) -> bool:
    """Whether this combination is kept from training, for scoring. Fixed for ever by its hash."""
    digest = hashlib.sha256(f"{shape}/{color}/{background}".encode()).digest()
    return digest[0] % _HELD_OUT_SHARE == 0


def held_out_captions(count: int, seed: int = 0) -> list[tuple[str, str, str, str]]:
    """(caption, shape, color, background) of combinations never trained on, in a fixed order."""
    combinations = [
        (shape, color, background)
        for shape in SHAPES
        for color in COLORS
        for background in COLORS
        if color != background and is_held_out(shape, color, background)
    ]
    random.Random(seed).shuffle(combinations)
    chosen = [combinations[i % len(combinations)] for i in range(count)]
    return [(f"{_article(c)} {c} {s} on {_article(b)} {b} background", s, c, b) for s, c, b in chosen]


def random_scene(rng: random.Random, *, width: int, height: int) -> Scene:
    """A scene for training: one shape (70%), two in a relation (20%) or several alike (10%). Never a held-out one."""
    while True:
        kind = rng.random()
        if kind < 0.70:
            scene = _one(rng, width, height)
        elif kind < 0.90:
            scene = _two(rng, width, height)
        else:
            scene = _several(rng, width, height)
        if not scene.held_out:
            return scene


def draw(scene: Scene, *, width: int, height: int, rng: random.Random) -> Image.Image:
    """The scene as an RGB image, antialiased. `rng` shifts each color a little."""
    scale = _SUPERSAMPLE
    canvas = Image.new("RGB", (width * scale, height * scale), _jittered(scene.background, rng))
    pen = ImageDraw.Draw(canvas)
    side = min(width, height) * scale
    for item in scene.items:
        x = width * scale / 2 + item.x * side
        y = height * scale / 2 + item.y * side
        color = _jittered(item.color, rng)
        _draw_shape(pen, item.shape, (x, y), item.radius * side, color)
        if item.outlined and item.shape != "ring":
            _draw_shape(pen, item.shape, (x, y), item.radius * side * 0.62, _jittered(scene.background, rng))
    return canvas.resize((width, height), Image.Resampling.BOX)


def _one(rng: random.Random, width: int, height: int) -> Scene:
    shape, color, background = _combination(rng)
    size = rng.choice(["", "", *SIZES])
    radius = rng.uniform(*SIZES[size])
    place = rng.choice([*PLACES]) if size != "large" and rng.random() < 0.3 else ""
    outlined = shape != "ring" and rng.random() < 0.06
    dx, dy = PLACES.get(place, (0.0, 0.0))
    x, y = _placed(dx, dy, radius, width, height)
    x, y = x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03)
    noun = " ".join(filter(None, ["outlined" if outlined else "", color, shape]))
    noun = " ".join(filter(None, [size, noun]))
    item = Item(shape=shape, color=color, x=x, y=y, radius=radius, outlined=outlined)
    return Scene(
        background=background, items=(item,), caption=_caption(rng, f"{_article(noun)} {noun}", background, place)
    )


def _two(rng: random.Random, width: int, height: int) -> Scene:
    shape, color, background = _combination(rng)
    other_shape = rng.choice(SHAPES)
    other = rng.choice([c for c in COLORS if c not in (background, color)])
    relation = rng.choice([*RELATIONS])
    dx, dy = RELATIONS[relation]
    radius, other_radius = rng.uniform(0.15, 0.2), rng.uniform(0.15, 0.2)
    items = (
        Item(shape=shape, color=color, x=dx * 0.24, y=dy * 0.24, radius=radius),
        Item(shape=other_shape, color=other, x=-dx * 0.24, y=-dy * 0.24, radius=other_radius),
    )
    first, second = f"{color} {shape}", f"{other} {other_shape}"
    words = f"{_article(first)} {first} {relation} {_article(second)} {second}"
    return Scene(background=background, items=items, caption=_caption(rng, words, background, ""))


def _several(rng: random.Random, width: int, height: int) -> Scene:
    shape, color, background = _combination(rng)
    count = rng.choice([*COUNTS])
    centres: Sequence[tuple[float, float]] = {
        2: ((-0.23, 0.0), (0.23, 0.0)),
        3: ((-0.22, 0.2), (0.22, 0.2), (0.0, -0.22)),
        4: ((-0.23, -0.23), (0.23, -0.23), (-0.23, 0.23), (0.23, 0.23)),
    }[count]
    radius = rng.uniform(0.14, 0.18)
    items = tuple(
        Item(
            shape=shape,
            color=color,
            x=x + rng.uniform(-0.02, 0.02),
            y=y + rng.uniform(-0.02, 0.02),
            radius=radius,
        )
        for x, y in centres
    )
    plural = f"{shape}es" if shape == "cross" else f"{shape}s"
    return Scene(
        background=background,
        items=items,
        caption=_caption(rng, f"{COUNTS[count]} {color} {plural}", background, ""),
    )


def _combination(rng: random.Random) -> tuple[str, str, str]:
    color, background = rng.sample([*COLORS], 2)
    return rng.choice(SHAPES), color, background


def _caption(rng: random.Random, words: str, background: str, place: str) -> str:
    lead = rng.choice(["", "", "", "an image of ", "a picture of "])
    backdrop = rng.choice(
        [f"on {_article(background)} {background} background"] * 3
        + [f"on {background}", f"against {_article(background)} {background} background"]
    )
    return " ".join(filter(None, [f"{lead}{words}", place, backdrop]))


def _placed(dx: float, dy: float, radius: float, width: int, height: int) -> tuple[float, float]:
    """A centre that leaves a small margin at the image's edge, as shares of the shorter side."""
    side = min(width, height)
    margin = 0.05
    return dx * (width / side / 2 - radius - margin), dy * (height / side / 2 - radius - margin)


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _jittered(color: str, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, v + rng.randint(-_JITTER, _JITTER))) for v in COLORS[color])
    return red, green, blue


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, color: tuple[int, int, int]
) -> None:
    x, y = centre
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "ring":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=round(radius * 0.42))
    else:
        pen.polygon([(x + px * radius, y + py * radius) for px, py in outline(shape)], fill=color)


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1 about the origin, y downwards."""
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]
    if shape == "diamond":
        return [(0.0, -1.05), (0.72, 0.0), (0.0, 1.05), (-0.72, 0.0)]
    if shape == "cross":
        arm = 0.34
        quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm), (arm, 1.0)]
        return quarter + [(-px, -py) for px, py in quarter]
    if shape == "star":
        turns = [(i, 1.05 if i % 2 == 0 else 0.43) for i in range(10)]
        return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in turns]
    if shape == "heart":
        steps = [i * 2 * math.pi / 60 for i in range(60)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
            )
            for t in steps
        ]
    raise ValueError(f"shape {shape!r} has no outline; shapes are {', '.join(SHAPES)}")
