"""The page of settings: every environment variable that a process reads."""

from __future__ import annotations

from typing import Any

from calotype.gateway.settings import GatewaySettings
from calotype_shared.settings import Settings, StrictSettings
from calotype_worker.settings import WorkerSettings
from tools.reference.markdown import code, generated, table

GROUPS: tuple[tuple[str, str, type[StrictSettings]], ...] = (
    ("All processes", "Read by producers, workers and gateways.", Settings),
    ("Workers", "Read by `calotype worker`. Its options override them.", WorkerSettings),
    ("The gateway", "Read by `calotype gateway`, and by `calotype up` for its gateway.", GatewaySettings),
)

_LONGEST_PATTERN = 60  # characters that say more than the description does

_INTRODUCTION = """
Settings are environment variables, read once at start-up. If one is unknown or malformed, the process stops and
names it.
"""


def page() -> str:
    parts = [generated("Settings", "the settings classes"), _INTRODUCTION]
    for title, sentence, settings in GROUPS:
        prefix = str(settings.model_config["env_prefix"])
        schema = settings.model_json_schema()["properties"]
        rows = [
            (
                code(f"{prefix}{name.upper()}"),
                "; ".join(filter(None, (kind(schema[name]), constraints(schema[name])))),
                default(field.default),
                field.description or "",
            )
            for name, field in settings.model_fields.items()
        ]
        parts.append(f"\n## {title}\n\n{sentence}\n")
        parts.append(table(("variable", "type, allowed values", "default", "meaning"), rows))
    return "\n".join(parts)


def _arms(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a type, without null."""
    return [arm for arm in schema.get("anyOf", [schema]) if arm.get("type") != "null"]


def kind(schema: dict[str, Any]) -> str:
    """The type as text."""
    names = []
    for arm in _arms(schema):
        if arm.get("format") == "password":
            names.append("secret")
        elif arm.get("type") == "array":
            names.append("list, separated by commas")
        elif arm.get("type") == "object":
            names.append("pairs `a=b`, separated by commas")
        else:
            words = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}
            names.append(words[arm["type"]])
    return " or ".join(names)


def default(value: object) -> str:
    if value is None or value in ("", frozenset(), {}):
        return "none"
    if isinstance(value, bool):
        return code(str(value).lower())
    return code(_number(value) if isinstance(value, float) else value)


def constraints(schema: dict[str, Any], *, words: bool = True) -> str:
    """The constraints of a value beyond its type. Without `words`, only those of numbers."""
    found = []
    for arm in _arms(schema):
        if words and "enum" in arm:
            found.append(", ".join(code(value) for value in arm["enum"]))
        low, high = arm.get("minimum"), arm.get("maximum")
        if low is not None and high is not None:
            found.append(f"{_number(low)} to {_number(high)}")
        elif low is not None:
            found.append(f"at least {_number(low)}")
        if "exclusiveMinimum" in arm:
            found.append(f"above {_number(arm['exclusiveMinimum'])}")
        if "exclusiveMaximum" in arm:
            found.append(f"below {_number(arm['exclusiveMaximum'])}")
        if words and len(arm.get("pattern", "")) in range(1, _LONGEST_PATTERN):
            found.append(code(arm["pattern"]))
    return "; ".join(found)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)
