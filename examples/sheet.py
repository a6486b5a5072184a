"""What the examples share: images with captions on one sheet in out/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from calotype.contact_sheet import Print, contact_sheet


def save_sheet(name: str, images: Sequence[tuple[Image, str]]) -> None:
    """Write out/NAME.png, and each image as out/NAME-0.png, out/NAME-1.png and so on."""
    folder = Path("out")
    folder.mkdir(exist_ok=True)
    for index, (image, _) in enumerate(images):
        image.save(folder / f"{name}-{index}.png")
    prints = [Print(image=image, title=caption) for image, caption in images]
    sheet = contact_sheet(prints, columns=3 if len(prints) in (5, 6) else 4)
    sheet.save(folder / f"{name}.png")
    print(f"out/{name}.png")
