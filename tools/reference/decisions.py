"""The list of decision notes."""

from __future__ import annotations

from pathlib import Path

from tools.reference.markdown import generated

NOTES = Path(__file__).parents[2] / "docs" / "decisions"


def page() -> str:
    """Titles in order, with links."""
    lines = []
    for note in sorted(NOTES.glob("[0-9]*.md")):
        number, _, title = note.read_text().partition("\n")[0].removeprefix("# ").partition(". ")
        lines.append(f"{int(number)}. [{title}]({note.name})")
    return (
        generated("Decisions", "the notes in this folder")
        + "\nDesign decisions with their reasons, and what was tried and rejected.\n\n"
        + "\n".join(lines)
        + "\n"
    )
