"""The HTTP API: its OpenAPI document, and a page of its routes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from calotype.gateway.app import create_app
from calotype.gateway.settings import GatewaySettings
from calotype_shared.settings import Settings
from tools.reference.markdown import code, generated, table

_INTRODUCTION = """
A running gateway serves its OpenAPI document at `/openapi.json`, also as [openapi.json](openapi.json). Examples are in
[the HTTP API](../http-api.md).

All routes except those of health checks can also return {common}: [what they mean](../http-api.md#authentication).
"""
# The tags of the routers, in the order of the page, with a heading each.
_TAGS = {
    "jobs": "Jobs",
    "uploads": "Uploads",
    "openai": "OpenAI's API: images and models",
    "batches": "OpenAI's API: files and batches",
    "automatic1111": "AUTOMATIC1111's API",
    "operating": "Operation",
}


@cache
def _document() -> dict[str, Any]:
    return create_app(Settings(), GatewaySettings()).openapi()


def schema() -> str:
    return json.dumps(_document(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def page() -> str:
    common = ", ".join(sorted(_common()))
    parts = [generated("HTTP routes", "the gateway's OpenAPI document"), _INTRODUCTION.format(common=common)]
    by_tag: dict[str, list[tuple[str, ...]]] = {}
    for path, methods in _document()["paths"].items():
        for method, operation in methods.items():
            row = (code(f"{method.upper()} {path}"), _says(operation), _takes(operation), _answers(path, operation))
            # A route's own tag comes after its router's.
            by_tag.setdefault(operation["tags"][-1], []).append(row)
    for tag in [*_TAGS, *sorted(by_tag.keys() - _TAGS)]:
        if tag in by_tag:
            parts.append(f"\n## {_TAGS.get(tag, tag)}\n")
            parts.append(table(("route", "purpose", "parameters and body", "status"), by_tag[tag]))
    return "\n".join(parts)


def _says(operation: dict[str, Any]) -> str:
    return str(operation.get("description") or operation.get("summary", "")).split("\n\n", maxsplit=1)[0]


def _takes(operation: dict[str, Any]) -> str:
    """Parameters, and what the body is."""
    named = [
        code(parameter["name"]) + (" (header)" if parameter["in"] == "header" else "")
        for parameter in operation.get("parameters", ())
        if parameter["in"] != "path"
    ]
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        name = str(content.get("schema", {}).get("$ref", "")).rpartition("/")[2]
        named.append(f"{media}: {code(name)}" if name and media == "application/json" else media)
    return ", ".join(named)


def _answers(path: str, operation: dict[str, Any]) -> str:
    return ", ".join(sorted(set(operation["responses"]) - (_common() if "/v1/" in path else set())))


@cache
def _common() -> frozenset[str]:
    """The statuses that all routes with a version in their path can return."""
    paths = _document()["paths"].items()
    answers = [set(operation["responses"]) for path, ways in paths if "/v1/" in path for operation in ways.values()]
    return frozenset(set.intersection(*answers))
