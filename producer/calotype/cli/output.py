"""Output of the commands: results on standard output, messages and errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calotype_shared.errors import CalotypeError, InvalidRequest
from calotype_shared.schema.jobs import JobRecord


def print_json(value: object) -> None:
    """Print one line of JSON on standard output."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def say(text: str) -> None:
    """Print one line on standard error."""
    print(plain(text), file=sys.stderr, flush=True)


def plain(text: str) -> str:
    """The text without terminal control characters: parts of it may come from other users."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def report(code: str, message: str, *, as_json: bool, details: Mapping[str, Any] | None = None) -> None:
    """Print an error as one line or one JSON object."""
    if as_json:
        say(json.dumps({"error": {"code": code, "message": message, **(details or {})}}, ensure_ascii=False))
    else:
        say(f"error: {message}")


def error_details(error: CalotypeError) -> dict[str, Any]:
    if isinstance(error, InvalidRequest):
        return {"field": error.field, "value": repr(error.value), "remedy": error.remedy}
    return {}


def record_json(record: JobRecord) -> dict[str, Any]:
    return {**record.model_dump(mode="json"), "progress": round(record.progress, 4)}


def record_line(record: JobRecord) -> str:
    """A job as one line."""
    line = f"{record.id}  {record.state.value:<9}  {record.progress:4.0%}"
    if record.newer:
        line += f"  written by a newer version (schema {record.schema_number})"
    if record.worker:
        line += f"  {record.worker}"
    if record.error is not None:
        line += f"  {record.error.code}: {record.error.message}"
    return line


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, as wide as its content in a pipe, as wide as the window in a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(str(cell))) for cell in row))  # a `Text`, as `[…]` in a plain one would be markup
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


def clock_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
