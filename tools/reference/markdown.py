"""What the pages are written with: a heading that says where they come from, tables, cells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def generated(title: str, source: str) -> str:
    """The head of a page, in Markdown."""
    return f"# {title}\n\n<!-- Made by `make reference` from {source}. Changes go there. -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines) + "\n"


def cell(text: str) -> str:
    """One line, with no bar that would end the cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", re.sub(r"\s+", " ", text)).strip()


def code(text: object) -> str:
    return f"`{text}`" if str(text) else ""


def docstring(text: str | None) -> str:
    """A docstring as Markdown: what it raises becomes a list."""
    lines = (text or "").strip().splitlines()
    out: list[str] = []
    raises = False
    for line in _dedented(lines):
        if line == "Raises:":
            raises = True
            out += ["Raises:", ""]
        elif raises and re.match(r" {4}\S", line):
            name, colon, rest = line.strip().partition(":")
            out.append(f"- `{name}`:{rest}" if colon else f"- {line.strip()}")
        elif raises and line.startswith(" "):
            out[-1] += f" {line.strip()}"
        else:
            out.append(line)
    return "\n".join(out).strip() + "\n"


def _dedented(lines: Sequence[str]) -> list[str]:
    """Without the indentation that all lines but the first share."""
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(margins, default=0)
    return [line.rstrip() if not index else line[margin:].rstrip() for index, line in enumerate(lines)]
