"""Reads docker-compose.yml and the Dockerfiles as Docker would, as far as our services use them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = sorted((ROOT / "infra" / "docker").glob("*.Dockerfile"))
VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?:(?P<operator>:[-?])(?P<rest>[^}]*))?\})")


def compose() -> dict[str, Any]:
    """As it is written, with its anchors followed."""
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """`$$`, `${NAME}`, `${NAME:-default}` and `${NAME:?error}`, which raises LookupError, anywhere within a value."""
    if isinstance(value, dict):
        return {key: interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, variables) for item in value]
    return VARIABLE.sub(lambda found: _expanded(found, variables), value) if isinstance(value, str) else value


def _expanded(found: re.Match[str], variables: Mapping[str, str]) -> str:
    name, operator, rest = found["name"], found["operator"], found["rest"]
    if name is None:
        return "$"
    given = variables.get(name, "")
    if operator == ":?" and not given:
        raise LookupError(f"{name}: {rest}")
    return given or (rest if operator == ":-" else "")


def seconds(duration: str) -> int:
    """Of `90s`, `10m`."""
    return int(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Each instruction's word, in capitals, and the rest."""
    written = "\n".join(line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [line.strip() for line in re.sub(r"\\\n", " ", written).splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def last_stage(dockerfile: Path) -> list[tuple[str, str]]:
    """The instructions that the image itself is made of."""
    found = instructions(dockerfile)
    return found[max(i for i, (word, _) in enumerate(found) if word == "FROM") :]


def variables_of(dockerfile: Path) -> dict[str, str]:
    """What ENV sets, but for PATH."""
    pairs = [pair.partition("=") for word, rest in last_stage(dockerfile) if word == "ENV" for pair in rest.split()]
    return {name: value for name, _, value in pairs if name != "PATH"}
