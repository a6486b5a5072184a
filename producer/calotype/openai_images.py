"""Translates OpenAI's images API: from its requests to configs, and from images to its responses.

Used by the gateway's routes and for the lines of batches. `size`, `n`, `quality`, `output_format` and
`response_format` are OpenAI's; every field of `GenerationConfig` may be added (`extra_body` in OpenAI's SDK).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from calotype.resolver import with_preset
from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.storage.images import decoding

MAX_N = 10
# OpenAI's values of `quality`, as Calotype's presets.
_QUALITIES = {
    "low": "fast",
    "medium": "balanced",
    "standard": "balanced",
    "high": "high",
    "hd": "high",
    "xhigh": "high",
    "max": "high",
}
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
# OpenAI's fields without a meaning here; accepted so that existing clients work unchanged.
_WITHOUT_EFFECT = {
    "complexity",
    "input_fidelity",
    "moderation",
    "prompt_rewriter",
    "safety_identifier",
    "style",
    "user",
}


class Generation(NamedTuple):
    """A translated request."""

    config: GenerationConfig  # not resolved yet
    as_url: bool  # else the image itself, in base64
    stream: bool
    partial_images: int


def read_generation(body: Mapping[str, Any]) -> Generation:
    """Convert the fields of a request to a config.

    Raises:
        InvalidRequest: names the field as the request did.
    """
    values = {name: value for name, value in body.items() if name not in _WITHOUT_EFFECT and value is not None}
    response_format = values.pop("response_format", "b64_json")
    if response_format not in ("b64_json", "url"):
        raise _wrong("response_format", response_format, "use b64_json or url")
    background = values.pop("background", "auto")
    if background not in ("auto", "opaque"):
        raise _wrong("background", background, "use auto or opaque; models here make images without transparency")
    compression = values.pop("output_compression", 100)
    if isinstance(compression, bool) or not isinstance(compression, int) or not 0 <= compression <= 100:
        raise _wrong("output_compression", compression, "use 0 to 100; it has no effect yet")
    if (frames := values.pop("frame_count", 1)) != 1:
        values["num_frames"] = frames
    stream = bool(values.pop("stream", False))
    partial_images = values.pop("partial_images", 0)
    if not isinstance(partial_images, int) or not 0 <= partial_images <= 3:
        raise _wrong("partial_images", partial_images, "use 0 to 3")
    n = values.pop("n", 1)
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_N:
        raise _wrong("n", n, f"use 1 to {MAX_N}")
    size = values.pop("size", "auto")
    if size != "auto":
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None:
            raise _wrong("size", size, "use WIDTHxHEIGHT, for instance 512x512, or auto")
        values |= {"width": int(match[1]), "height": int(match[2])}
    quality = values.pop("quality", "auto")
    if quality != "auto":
        if quality not in (*_QUALITIES, *_QUALITIES.values()):
            raise _wrong("quality", quality, f"use auto, {', '.join(_QUALITIES)}")
        values["quality"] = _QUALITIES.get(quality, quality)
    values.setdefault("num_images", n)
    return Generation(GenerationConfig.parse(with_preset(values)), response_format == "url", stream, partial_images)


def image_data(image: Mapping[str, Any], *, url: str | None = None, b64: str | None = None) -> dict[str, Any]:
    """One image of a response. `seed` is Calotype's own field: with it, the image can be generated again."""
    shown = {"url": url} if b64 is None else {"b64_json": b64}
    return {**shown, "seed": image["seed"]}


def _wrong(field: str, value: object, remedy: str) -> InvalidRequest:
    return InvalidRequest("is not valid", field=field, value=value, remedy=remedy)


def inverted_mask(data: bytes) -> bytes:
    """Convert OpenAI's mask (transparent where to paint) to Calotype's (white where to paint), as a PNG file.

    Raises:
        InvalidRequest: it is not an image, or nothing in it is transparent.
    """
    import io  # noqa: PLC0415 - only where a mask comes

    import PIL.ImageOps  # noqa: PLC0415

    with decoding(data, "mask") as image:
        size = image.size
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        alpha = (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A") if has_alpha else None
    if alpha is None or alpha.getextrema()[0] >= 128:  # type: ignore[operator]  # of a single band
        raise InvalidRequest(
            "has no transparent pixels",
            field="mask",
            value=f"{size[0]}x{size[1]}",
            remedy="make the area to repaint transparent",
        )
    painted = io.BytesIO()
    PIL.ImageOps.invert(alpha).save(painted, "PNG")
    return painted.getvalue()
