"""A contact sheet: many images on one, each with its caption below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

_CELL = 256  # pixels; an image's longer side is brought to this
_GAP = 16
_FONT_SIZE = 15
_LINE = 20
_CAPTION_LINES = 5
_PAPER, _INK, _FAINT = (250, 249, 246), (30, 30, 30), (110, 110, 110)


@dataclass(frozen=True, kw_only=True)
class Print:
    """One image on the sheet: `title` in black, wrapped; `details` in gray, one per line."""

    image: Image
    title: str
    details: tuple[str, ...] = ()


def contact_sheet(prints: Sequence[Print], *, columns: int = 7) -> Image:
    """The prints in reading order. Small images are enlarged, so that a demo model's are easy to see."""
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - only drawing needs Pillow

    columns = max(1, min(columns, len(prints)))
    rows = -(-len(prints) // columns)
    cell_width, cell_height = _CELL + _GAP, _CELL + _CAPTION_LINES * _LINE + 2 * _GAP
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=_FONT_SIZE)
    for position, entry in enumerate(prints):
        row, column = divmod(position, columns)
        left, top = _GAP + column * cell_width, _GAP + row * cell_height
        image = _enlarged(entry.image)
        sheet.paste(image, (left + (_CELL - image.width) // 2, top + _CELL - image.height))
        lines = [(line, _INK) for line in _wrapped(pen, entry.title, font)]
        lines = lines[: _CAPTION_LINES - len(entry.details)] + [(line, _FAINT) for line in entry.details]
        for number, (line, ink) in enumerate(lines):
            pen.text((left, top + _CELL + _GAP // 2 + number * _LINE), line, fill=ink, font=font)
    return sheet


def _enlarged(image: Image) -> Image:
    from PIL.Image import Resampling  # noqa: PLC0415

    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Resampling.LANCZOS)


def _wrapped(pen: ImageDraw, text: str, font: FreeTypeFont | ImageFont) -> list[str]:
    """The text broken at spaces to the width of a cell."""
    lines: list[str] = []
    for word in text.split():
        if lines and pen.textlength(f"{lines[-1]} {word}", font=font) <= _CELL:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
