"""`python -m tools.reference`: write every generated page; with `--check`, only say which differ, and exit with 1."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.reference import (
    commands,
    decisions,
    diagrams,
    errors,
    http,
    pipelines,
    python_api,
    records,
    results,
    settings,
)

ROOT = Path(__file__).parents[2]

# Every file that nobody writes by hand; of the last two, the tables of results.
PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/settings.md": settings.page,
    "docs/reference/cli.md": commands.page,
    "docs/reference/http.md": http.page,
    "docs/reference/openapi.json": http.schema,
    "docs/reference/python.md": python_api.page,
    "docs/reference/states-and-keys.md": records.page,
    "docs/reference/errors.md": errors.page,
    "docs/decisions/index.md": decisions.page,
    "docs/models.md": pipelines.page,
    "docs/images/job-states.svg": diagrams.job_states,
    "docs/images/step-batch.svg": diagrams.step_batch,
    "docs/performance.md": results.filled("docs/performance.md"),
    "README.md": results.filled("README.md"),
}


def stale() -> dict[str, str]:
    """Pages that are not what the code would write now, as they should be."""
    found = {}
    for name, make in PAGES.items():
        path = ROOT / name
        wanted = re.sub(r"\n{3,}", "\n\n", make())
        if not path.is_file() or path.read_text() != wanted:
            found[name] = wanted
    return found


def main(arguments: Sequence[str]) -> int:
    old = stale()
    if "--check" in arguments:
        for name in old:
            print(f"{name} is not what the code says; run: make reference", file=sys.stderr)
        return 1 if old else 0
    for name, wanted in old.items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted)
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
