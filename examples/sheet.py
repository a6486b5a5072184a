"""What the examples share: pictures with captions on one sheet in out/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from calotype.contact_sheet import Print, contact_sheet


def save_sheet(name: str, pictures: Sequence[tuple[Image, str]]) -> None:
    """Write out/NAME.png, and each picture as out/NAME-0.png, out/NAME-1.png …"""
    folder = Path("out")
    folder.mkdir(exist_ok=True)
    for index, (picture, _) in enumerate(pictures):
        picture.save(folder / f"{name}-{index}.png")
    prints = [Print(image=picture, title=caption) for picture, caption in pictures]
    sheet = contact_sheet(prints, columns=3 if len(prints) in (5, 6) else 4)
    sheet.save(folder / f"{name}.png")
    print(f"out/{name}.png")
