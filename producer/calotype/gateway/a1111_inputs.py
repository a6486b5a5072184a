"""What AUTOMATIC1111's requests carry in places of their own: LoRAs in prompts, scripts, images in base64."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from typing import Any

from calotype.gateway.state import Services
from calotype.gateway.uploads import store_image
from calotype_shared.errors import InvalidRequest
from calotype_shared.storage.images import as_rgb, decoding

_PIECE = 2**20  # characters of base64 that are decoded at a time; a multiple of four
_LORA = re.compile(r"<lora:([^:<>]+)(?::([0-9.+-]+))?>")
# The built-in scripts that are always on: they only repeat fields of the request. By name, their arguments in order.
_REPEATING = {
    "sampler": ("steps", "sampler_name", "scheduler"),
    "seed": ("seed", None, None, "subseed_strength"),
}


def repeated_fields(scripts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the scripts Sampler and Seed set; they win over those of the request."""
    found: dict[str, Any] = {}
    for name, script in scripts.items():
        fields = _REPEATING.get(name.lower(), ())
        arguments = script_arguments(script)
        found |= {field: value for field, value in zip(fields, arguments, strict=False) if field and value is not None}
        if fields and len(arguments) > 1 and name.lower() == "seed" and not arguments[1]:
            found.pop("subseed_strength", None)  # its check box "Extra" is off
    return found


def script_arguments(script: Any) -> list[Any]:
    """The arguments of an entry of `alwayson_scripts`. Raises InvalidRequest."""
    arguments = script.get("args", []) if isinstance(script, Mapping) else script
    if not isinstance(arguments, (list, type(None))):
        raise InvalidRequest(
            "is not a list of arguments", field="alwayson_scripts", value=arguments, remedy="give args as a list"
        )
    return arguments or []


def loras_in(prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """The prompt without its `<lora:name:weight>`, and those."""
    loras = [{"name": name, "weight": weight or 1.0} for name, weight in _LORA.findall(prompt)]
    return _LORA.sub("", prompt).strip(), loras


async def controls_of(scripts: Mapping[str, Any], services: Services) -> list[dict[str, Any]]:
    """The units of ControlNet. Any other enabled script is refused."""
    controls = []
    for name, script in scripts.items():
        arguments = script_arguments(script)
        if name.lower() != "controlnet":
            if name.lower() not in _REPEATING and _is_on(arguments):
                raise InvalidRequest(
                    "is not available here", field="alwayson_scripts", value=name, remedy="leave it out"
                )
            continue
        active = [argument for argument in arguments if argument]
        for unit in active:
            if not isinstance(unit, Mapping):
                raise InvalidRequest(
                    "is not a unit", field="alwayson_scripts", value=unit, remedy="give model and image"
                )
            if not unit.get("enabled", True):
                continue
            image = unit.get("image") or unit.get("input_image")
            if isinstance(image, Mapping):
                image = image.get("image")
            if unit.get("module", "none") not in ("none", None) or not isinstance(image, str):
                raise InvalidRequest(
                    "needs a preprocessed control image",
                    field="alwayson_scripts",
                    value=unit.get("module"),
                    remedy="send it as image, with module none",
                )
            controls.append(
                {
                    "name": unit.get("model"),
                    "image": await stored(services, image, "alwayson_scripts"),
                    "scale": unit.get("weight", 1.0),
                    "start": unit.get("guidance_start", 0.0),
                    "end": unit.get("guidance_end", 1.0),
                }
            )
    return controls


def _is_on(arguments: list[Any]) -> bool:
    """Whether a script has an effect. The built-in ones are off when their first argument is false."""
    return any(arguments) and bool(arguments[0])


async def stored(services: Services, encoded: str, field: str, *, invert: bool = False) -> str:
    data = await services.in_images(decoded, encoded, field)
    if invert:
        data = await services.in_images(_inverted, data, field)
    upload_id, _ = await store_image(services, data, field=field)
    return upload_id


def decoded(encoded: str, field: str) -> bytes:
    """The bytes of an image in a request. Raises InvalidRequest."""
    if encoded.startswith("data:"):
        encoded = encoded.partition(",")[2]
    encoded = "".join(encoded.split())  # MIME breaks base64 into lines
    try:  # in pieces, between which other threads run
        pieces = (encoded[start : start + _PIECE] for start in range(0, len(encoded), _PIECE))
        return b"".join(base64.b64decode(piece, validate=True) for piece in pieces)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            "is not valid base64", field=field, value=encoded[:40], remedy="send a PNG, JPEG or WebP file in base64"
        ) from None


def _inverted(data: bytes, field: str) -> bytes:
    buffer = io.BytesIO()
    with decoding(data, field) as image:
        as_rgb(image, over="black").convert("L").point([255 - value for value in range(256)]).save(buffer, "PNG")
    return buffer.getvalue()
