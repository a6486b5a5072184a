"""The page of what is in Redis: a job's states and every key."""

from __future__ import annotations

import re

from calotype.batches.record import BatchState
from calotype_shared.queue import keys
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import TRANSITIONS
from tools.reference.markdown import generated, table

_BATCHES = """
## States of a batch

{names}. Their meaning: [batches](../batches.md#dispatchers).
"""


def page() -> str:
    document = keys.__doc__ or ""
    first, rows, rest = document.strip().split("\n\n", 2)
    names = ", ".join(f"`{state.value}`{' (final)' if state.final else ''}" for state in BatchState)
    return "\n".join(
        [
            generated("States and keys", "`calotype_shared/schema/jobs.py` and `keys.py`"),
            "Background: [why the record is the source of truth](../explanation/record.md).\n",
            "## States of a job\n",
            "![the five states and the transitions between them](../images/job-states.svg)\n",
            table(("from", "to", "by"), [(old.value, new.value, by) for (old, new), by in TRANSITIONS.items()]),
            f"Final: {', '.join(f'`{state.value}`' for state in JobState if state.final)}. A final job never changes.",
            _BATCHES.format(names=names),
            "## Keys\n",
            re.sub(r" *\n", " ", first) + "\n",
            re.sub(r"decision (\d+)", _linked, rows) + "\n",
            rest + "\n",
        ]
    )


def _linked(match: re.Match[str]) -> str:
    """A decision's number with its note behind it."""
    from tools.reference.decisions import NOTES  # noqa: PLC0415

    [note] = NOTES.glob(f"{int(match[1]):04}-*.md")
    return f"[decision {match[1]}](../decisions/{note.name})"
