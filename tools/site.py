"""What mkdocs.yml asks of MkDocs beyond docs/: the pages at the root of the repository, and links to what lies there.

In the repository a page links to files as they lie, so that links work there too; here they are turned to where the
same files are in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages, and the examples that pages link to."""
    shown = [*(ROOT / name for name in ROOT_PAGES), *(ROOT / "examples").glob("*.py")]
    for path in shown:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave docs/ or, from the root, lead into it."""
    folder = posixpath.dirname(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        moved = target.removeprefix("../" if page.file.src_uri not in ROOT_PAGES else "docs/")
        if moved == target:
            return match[0]
        return match[1] + posixpath.relpath(moved, folder or ".")

    return _LINK.sub(turned, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Bars in cells: GitHub wants them escaped in code too, and Python-Markdown then shows the backslash."""
    return re.sub(r"<td>.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)
