"""The documents as text: every link leads somewhere, every block of code can be read, every page can be found."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from calotype_worker.sampling import SAMPLERS, Trajectory, build_table, make_scheduler
from calotype_worker.sampling.table import SamplerTable

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
GUIDES = [page for page in PAGES if page.parent.name in ("tutorial", "how-to")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^|[`(]|\$ |do |-- )calotype ([a-z][^`\n]*)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """Without blocks of code, and without code in a line."""
    return re.sub(r"`[^`\n]*`", "code", BLOCK.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower().replace(" ", "-")
        found.add(name)
    return found


def broken(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(text):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file of this repository and, with an anchor, to a heading in it."""
    assert not broken(page, prose(page))


def test_broken_links_are_found() -> None:
    """The control: a file, a heading and a heading of this page that are not there, among others that are."""
    page = ROOT / "docs" / "index.md"
    text = "[a](batches.md) [b](batches.md#from-python) [c](../README.md#settings) [d](https://example.org/nowhere)"
    assert not broken(page, text)
    assert broken(page, f"{text} [e](batch.md) [f](batches.md#from-perl) [g](#nothing)") == [
        "batch.md",
        "batches.md#from-perl",
        "#nothing",
    ]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_code_can_be_read(page: Path) -> None:
    """Python compiles, as a part of a class if need be; the shell reads its commands."""
    assert unreadable(page.read_text()) == []


def unreadable(text: str) -> list[str]:
    """Blocks that are not in the language that they say."""
    found = []
    for kind, code in BLOCK.findall(text):
        if kind == "python":
            try:
                ast.parse(code)
            except SyntaxError as error:
                found.append(f"{code}\n{error}")
        elif kind == "sh":
            read = subprocess.run(["bash", "-n", "-c", code], capture_output=True, text=True, check=False)
            found += [f"{code}\n{read.stderr}"] if read.returncode else []
    return found


def test_code_that_cannot_be_read_is_found() -> None:
    """The control: a line of Python and one of shell that are none, among others that are."""
    good = "```python\nx = 1\n```\n\n```sh\necho 1\n```\n\n```\nnot ( read\n```\n"
    assert unreadable(good) == []
    [python, shell] = unreadable(f"{good}\n```python\nx = = 1\n```\n\n```sh\necho (\n```\n")
    assert "invalid syntax" in python
    assert "syntax error" in shell


def test_commands_and_settings_in_the_guides_exist() -> None:
    """Every variable is in the reference, every subcommand and every option that follows it too."""
    settings = (ROOT / "docs/reference/settings.md").read_text()
    commands = (ROOT / "docs/reference/cli.md").read_text()
    sections = dict(re.findall(r"^## (calotype [\w -]+)\n(.*?)(?=^## |\Z)", commands, re.MULTILINE | re.DOTALL))
    seen, named, options = 0, 0, 0
    for page in [*GUIDES, ROOT / "docs/index.md"]:
        text = page.read_text()
        for variable in re.findall(r"\bCALOTYPE_[A-Z0-9_]+(?<!_)\b", text):
            assert f"`{variable}`" in settings, f"{page.name}: {variable}"
            named += 1
        for line in COMMAND.findall(text.replace("\\\n", " ")):
            words = [word for word in line.split() if re.fullmatch(r"[a-z]+(-[a-z]+)?", word)][:2]
            name = next((n for n in (f"calotype {' '.join(words[:k])}" for k in (2, 1)) if n in sections), None)
            assert name, f"{page.name}: calotype {line}"
            seen += 1
            for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", line):
                assert f"{option}" in sections[name], f"{page.name}: {name} has no {option}"
                options += 1
    assert min(seen, named, options) > 30


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Strictly: no page, link or anchor is missing. Every script, style, font and image is its own."""
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    subprocess.run([sys.executable, "-m", "tools.site", str(tmp_path / "build/docs")], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "site"
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    loaded = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\" >]+)|<link\b[^>]*\bhref=\"?([^\" >]+)")
    for page in pages:
        found = [script or style for script, style in loaded.findall(page.read_text())]
        assert found
        assert not [address for address in found if re.match(r"(?:https?:)?//", address)], page.name
    assert "float32|float16|bfloat16" in (site / "reference/cli.html").read_text(), "bars in cells are bars"
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert styles
    assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", styles)
    page = tmp_path / "build/docs/affinity.md"
    page.write_text(f"{page.read_text()}\n[a](features.md#no-such-anchor)\n")
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert built.returncode != 0
    assert "anchor does not exist" in built.stdout + built.stderr


def test_every_page_is_in_the_navigation() -> None:
    """Decision notes are found by their index."""
    text = re.sub(r"!\S+", "", (ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r":\s+([\w./-]+\.md)$", "\n".join(yaml_leaves(yaml.safe_load(text)["nav"])), re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    pages = {page for page in pages if not re.match(r"decisions/\d", page)}
    assert pages | {"ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"} == listed


def yaml_leaves(node: object, title: str = "") -> list[str]:
    """`title: file` of each entry."""
    if isinstance(node, dict):
        return [leaf for name, below in node.items() for leaf in yaml_leaves(below, name)]
    if isinstance(node, list):
        return [leaf for below in node for leaf in yaml_leaves(below)]
    return [f"{title}: {node}"]


def test_the_map_of_the_architecture_names_every_module() -> None:
    """Each module of the worker, its jobs, engine, samplers and models, and of what all parts share."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    unnamed, named = [], 0
    worker, shared = ROOT / "worker/calotype_worker", ROOT / "shared/calotype_shared"
    for folder in (worker, *(worker / name for name in ("jobs", "engine", "sampling", "models")), *shared.iterdir()):
        for path in folder.glob("[a-z]*.py"):
            if re.search(rf"\b{path.stem}(\.py)?`", text):
                named += 1
            else:
                unnamed.append(str(path.relative_to(ROOT)))
    assert not unnamed, "give each a sentence in the section Where things are"
    assert named > 70


def test_what_samplers_remember_is_what_their_tables_say() -> None:
    """The table of docs/explanation/step-batching.md, from the tables that the engine uses."""
    page = (ROOT / "docs/explanation/step-batching.md").read_text()
    rows = re.findall(r"^\| ([A-Z][^|]+) \| (\d) \|$", page, re.MULTILINE)
    said = {name.strip().lower(): int(k) for names, k in rows for name in names.split(",")}
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    for sampler in SAMPLERS:
        table = build_table(Trajectory.whole(make_scheduler(sampler, schedule, 20)))
        assert isinstance(table, SamplerTable)
        written = sampler.value.removesuffix("_karras").replace("pp_", "++_")
        [shown] = [k for name, k in said.items() if re.sub("[ -]", "_", name) == written]
        assert table.remembered == shown, sampler
