"""Assembles the pages of the site: docs/, the pages at the root of the repository, and the examples that they link to.

    python -m tools.site build/docs

In the repository a page links to files where they are, so that links work there too. Here links from docs/ to the
root, and from the root into docs/, are rewritten to where the same files are in the site.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s#]+)")
_CODE = re.compile(r"`[^`\n]*`")
_ROW = re.compile(r"^\|.*\|$", re.MULTILINE)


def assemble(target: Path) -> None:
    """Write all pages anew into the folder `target`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target)
    for path in [*(ROOT / name for name in ROOT_PAGES), *(ROOT / "examples").glob("*.py")]:
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    for page in target.rglob("*.md"):
        name = page.relative_to(target).as_posix()
        page.write_text(_ROW.sub(_plain_bars, relinked(name, page.read_text())))


def relinked(page: str, markdown: str) -> str:
    """The text of a page, named by its path in the site, with links that leave docs/ or lead into it rewritten."""
    folder = posixpath.dirname(page)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        inside = target.removeprefix("docs/" if page in ROOT_PAGES else "../")
        return match[0] if inside == target else match[1] + posixpath.relpath(inside, folder or ".")

    return _LINK.sub(moved, markdown)


def _plain_bars(row: re.Match[str]) -> str:
    """GitHub wants bars in a table's code escaped; Python-Markdown would show the backslash."""
    return _CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0])


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
