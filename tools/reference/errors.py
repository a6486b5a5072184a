"""The page of errors: the tree, and the code and statuses of each error."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import calotype_shared.errors as source
from calotype.cli.exit_codes import exit_code
from calotype.gateway.errors import STATUSES
from calotype_shared.errors import CalotypeError
from tools.reference.markdown import code, generated, table

_AFTER = """
`code` is stable and for programs; messages are for people and can change. A failed job has the code and the
message in its record's `error`.
"""


def page() -> str:
    document = inspect.getdoc(source) or ""
    first, tree, last = document.split("\n\n", 2)
    said = {match[1]: match[2] for match in re.finditer(r"^[ │├└─]*(\w+) *(.*)$", tree, re.M)}
    rows = [
        (
            code(error.__name__),
            code(error.code),
            said.get(error.__name__, ""),
            str(exit_code(_example(error)).value),
            str(next((STATUSES[kind] for kind in error.__mro__ if kind in STATUSES), 500)),
        )
        for error in _tree(CalotypeError)
    ]
    return "\n".join(
        [
            generated("Errors", "`calotype_shared/errors.py`"),
            f"{first} {last}\n",
            f"```\n{tree}\n```\n",
            table(("error", "code", "when", "exit status", "HTTP status"), rows),
            _AFTER.strip() + "\n",
        ]
    )


def _tree(error: type[CalotypeError]) -> Iterator[type[CalotypeError]]:
    yield error
    for child in error.__subclasses__():
        if child.__module__ == source.__name__:
            yield from _tree(child)


def _example(error: type[CalotypeError]) -> CalotypeError:
    """One of its kind, to ask what becomes of it."""
    made = error.__new__(error)
    Exception.__init__(made, "")
    return made
