"""Converts pydantic's validation errors to `InvalidRequest`: one field, its value and what would work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import OutputFormat, SamplerType


def invalid_request(error: ValidationError, *, fields: Collection[str]) -> InvalidRequest:
    """The first of pydantic's errors, as one sentence with a remedy. `fields` are the existing fields."""
    return explained(error.errors(include_url=False)[0], fields=fields)


def explained(first: Mapping[str, Any], *, fields: Collection[str]) -> InvalidRequest:
    """One of pydantic's complaints, as `invalid_request`."""
    field = ".".join(str(part) for part in first["loc"]) or "config"
    kind = first["type"]
    context = first.get("ctx", {})
    field = str(context.get("field", field))
    value = None if kind == "missing" else context.get("value", first.get("input"))
    remedies = {
        "missing": "give it",
        "extra_forbidden": f"remove it, or use one of: {', '.join(fields)}",
        "enum": f"use one of: {', '.join(s.value for s in _choices(field))}",
        "multiple_of": f"use {_nearest_multiple(value, context.get('multiple_of', 8))}",
        "greater_than_equal": f"use at least {context.get('ge')}",
        "less_than_equal": f"use at most {context.get('le')}",
        "lcm_steps": f"use at most {context.get('most')}, or another sampler",
        "string_too_long": f"shorten it to {context.get('max_length')} characters",
        "finite_number": "use a finite number",
        "string_pattern_mismatch": "use lower-case letters, digits, '.', '_' and '-' (a registered name, not a path)",
    }
    problem = str(first["msg"]).removeprefix("Value error, ")
    remedies |= {kind: str(context["remedy"])} if "remedy" in context else {}
    return InvalidRequest(
        problem[:1].lower() + problem[1:], field=field, value=value, remedy=remedies.get(kind, "correct it")
    )


def _choices(field: str) -> type[StrEnum]:
    return OutputFormat if field == "output_format" else SamplerType


def _nearest_multiple(value: object, factor: object) -> str:
    if not isinstance(value, int) or not isinstance(factor, int):
        return f"a multiple of {factor}"
    below = max(factor, value // factor * factor)
    return f"{below} or {below + factor}"
