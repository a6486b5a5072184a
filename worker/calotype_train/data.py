"""Training images with captions: a folder in the Hugging Face `imagefolder` convention, encoded once.

FOLDER/metadata.jsonl    {"file_name": "0001.png", "text": "a red circle on a blue background"}
                         ControlNets: also {"conditioning_file_name": "0001-outline.png"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from calotype_shared.errors import InvalidRequest

METADATA = "metadata.jsonl"
_ENCODED_TOGETHER = 8  # images a VAE call


@dataclass(frozen=True, kw_only=True)
class Example:
    image: Path
    text: str
    condition: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one size. Captions are text, which the recipe encodes."""

    latents: torch.Tensor  # (B, C, h, w), scaled to unit deviation
    captions: tuple[str, ...]
    conditions: torch.Tensor | None = None  # (B, 3, 8h, 8w) in 0..1

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """All images of one size, encoded."""

    width: int  # pixels
    height: int
    latents: torch.Tensor  # (N, C, h, w) float32
    captions: tuple[str, ...]
    conditions: torch.Tensor | None = None  # (N, 3, height, width) uint8

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, rows: Sequence[int]) -> Batch:
        index = torch.tensor(rows)
        return Batch(
            latents=self.latents[index],
            captions=tuple(self.captions[row] for row in rows),
            conditions=None if self.conditions is None else self.conditions[index].float() / 255,
        )


@dataclass(frozen=True, kw_only=True)
class Images:
    """The buckets of a set of examples."""

    buckets: tuple[Bucket, ...]

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(caption for bucket in self.buckets for caption in bucket.captions)

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        """A random batch of one size, sizes in proportion to their images; no image twice if there are enough."""
        sizes = torch.tensor([float(len(bucket)) for bucket in self.buckets])
        bucket = self.buckets[int(torch.multinomial(sizes, 1, generator=generator))]
        count = len(bucket)
        if rows <= count:
            chosen = torch.randperm(count, generator=generator)[:rows]
        else:
            chosen = torch.randint(count, (rows,), generator=generator)
        return bucket.batch(chosen.tolist())


def read_examples(folder: Path, *, conditions: bool = False) -> list[Example]:
    """The examples that `metadata.jsonl` lists, in its order.

    Raises:
        InvalidRequest: the folder, the list or an image does not exist, or a line is not a valid example.
    """
    listing = folder / METADATA
    if not listing.is_file():
        raise InvalidRequest(
            f"the data folder has no {METADATA}",
            field="--data",
            value=str(folder),
            remedy='create it, with a line {"file_name": "1.png", "text": "what it shows"} for each image',
        )
    lines = [(number, line) for number, line in enumerate(listing.read_text().splitlines(), start=1) if line.strip()]
    examples = [_example(folder, number, line, conditions=conditions) for number, line in lines]
    if len(examples) < 2:
        raise InvalidRequest(
            f"{METADATA} lists fewer than two images",
            field="--data",
            value=str(folder),
            remedy="list at least one for training and one for validation",
        )
    return examples


def _example(folder: Path, number: int, line: str, *, conditions: bool) -> Example:
    keys = ("file_name", "text", "conditioning_file_name") if conditions else ("file_name", "text")
    try:
        entry = json.loads(line)
        values = {key: entry[key] for key in keys}
        if not all(isinstance(value, str) for value in values.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            "is not an example",
            field=f"{METADATA}:{number}",
            value=line,
            remedy=f"write a JSON object with the strings {', '.join(keys)}",
        ) from error
    paths = {key: folder / values[key] for key in keys if key != "text"}
    for key, path in paths.items():
        if not path.is_file():
            raise InvalidRequest(
                "does not exist in the data folder",
                field=f"{METADATA}:{number} {key}",
                value=values[key],
                remedy="add the file or remove the line",
            )
    return Example(image=paths["file_name"], text=values["text"], condition=paths.get("conditioning_file_name"))


def hold_out(examples: Sequence[Example], *, share: float, most: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and examples to judge by.

    Which images are held out depends only on their names, not on the number of images or the seed.
    """
    count = max(1, min(most, round(share * len(examples))))
    ranked = sorted(examples, key=lambda example: hashlib.sha256(example.image.name.encode()).digest())
    held = ranked[: min(count, len(examples) - 1)]
    return [example for example in examples if example not in held], held


def encode(examples: Sequence[Example], vae: Any, *, sizes: Sequence[tuple[int, int]], device: torch.device) -> Images:
    """Latents (the mean of the VAE's posterior, scaled) of all images, each cropped to the size nearest in aspect.

    `sizes` are (width, height) in pixels. Each image goes through the VAE once in a run.

    Raises:
        InvalidRequest: a file is not an image.
    """
    by_size: dict[tuple[int, int], list[Example]] = {}
    for example in examples:
        by_size.setdefault(nearest_size(_open(example.image).size, sizes), []).append(example)
    buckets = []
    for (width, height), members in sorted(by_size.items()):
        latents = []
        for begin in range(0, len(members), _ENCODED_TOGETHER):
            part = [_pixels(example.image, width, height) for example in members[begin : begin + _ENCODED_TOGETHER]]
            latents.append(_to_latents(vae, torch.stack(part).to(device)).cpu())
        conditions = [_pixels(e.condition, width, height) for e in members if e.condition is not None]
        buckets.append(
            Bucket(
                width=width,
                height=height,
                latents=torch.cat(latents),
                captions=tuple(example.text for example in members),
                conditions=torch.stack(conditions) if conditions else None,
            )
        )
    return Images(buckets=tuple(buckets))


@torch.no_grad()
def _to_latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 to (B, C, H/8, W/8)."""
    latents = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) with the nearest aspect ratio; the first if several are equal."""
    aspect = np.log(size[0] / size[1])
    return min(sizes, key=lambda own: abs(np.log(own[0] / own[1]) - aspect))


def _pixels(path: Path, width: int, height: int) -> torch.Tensor:
    """(3, height, width) uint8: scaled to cover, then cropped about its centre."""
    fitted = ImageOps.fit(_open(path), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InvalidRequest(
            "is not an image that Pillow can read",
            field="--data",
            value=path.name,
            remedy="replace it or remove its line",
        ) from error
