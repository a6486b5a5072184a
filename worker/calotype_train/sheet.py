"""Contact sheets for comparison: one column per prompt, one row per model, captions below, row names at the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP, _FONT_SIZE, _LINE, _CAPTION_LINES = 8, 12, 15, 4
_PAPER, _INK = (250, 249, 246), (30, 30, 30)


def comparison(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Rows of images in aligned columns. Images keep their size; cells have the size of the largest."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    every = [image for images in rows.values() for image in images]
    width, height = max(p.width for p in every), max(p.height for p in every)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = round(max(pen.textlength(name, font=font) for name in rows)) + 2 * _GAP
    below = _CAPTION_LINES * _LINE + _GAP
    page = Image.new("RGB", (left + len(captions) * (width + _GAP), _GAP + len(rows) * (height + _GAP) + below), _PAPER)
    pen = ImageDraw.Draw(page)
    for number, (name, images) in enumerate(rows.items()):
        top = _GAP + number * (height + _GAP)
        pen.text((_GAP, top + height // 2 - _LINE // 2), name, fill=_INK, font=font)
        for column, image in enumerate(images):
            x = left + column * (width + _GAP)
            page.paste(image, (x + (width - image.width) // 2, top + (height - image.height) // 2))
    for column, caption in enumerate(captions):
        lines = [""]
        for word in caption.split():
            longer = f"{lines[-1]} {word}".strip()
            if pen.textlength(longer, font=font) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
        for number, line in enumerate(lines[:_CAPTION_LINES]):
            place = (left + column * (width + _GAP), page.height - below + number * _LINE)
            pen.text(place, line, fill=_INK, font=font)
    return page
