"""The reference is what the code says, and says something about everything."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest

import calotype
import calotype_worker
from calotype.gateway.settings import GatewaySettings
from calotype_shared.settings import Settings, StrictSettings
from calotype_worker.settings import WorkerSettings
from tools.reference import python_api, results
from tools.reference.__main__ import PAGES, stale

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_every_generated_page_is_what_the_code_says() -> None:
    """Nobody edits them, and nobody forgets them: `make reference` writes them anew."""
    assert not list(stale()), "run: make reference"
    made = {path.name for path in REFERENCE.iterdir()}
    assert made == {Path(name).name for name in PAGES if name.startswith("docs/reference/")}


def test_a_page_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a folder in which one word of one page was changed."""
    root = REFERENCE.parents[1]
    for name in PAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((root / name).read_text())
    changed = tmp_path / "docs/reference/settings.md"
    changed.write_text(changed.read_text().replace("`calotype:`", "`calotypes:`"))
    monkeypatch.setattr("tools.reference.__main__.ROOT", tmp_path)
    assert list(stale()) == ["docs/reference/settings.md"]


def test_tables_follow_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that was run again makes the pages that show it stale; and every table is shown somewhere."""
    shutil.copytree(results.RESULTS, tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    assert not list(stale())
    latest = tmp_path / "results" / "latest.json"
    latest.write_text(latest.read_text().replace('"sequential": ', '"sequential": 1', 1))
    assert list(stale()) == ["docs/performance.md", "README.md"]
    pages = "".join((REFERENCE.parents[1] / name).read_text() for name in PAGES if name.endswith(".md"))
    assert {name for _, name, _ in results.BLOCK.findall(pages)} == set(results.TABLES)


@pytest.mark.parametrize("settings", [Settings, WorkerSettings, GatewaySettings])
def test_every_setting_is_described_beside_it(settings: type[StrictSettings]) -> None:
    """A line of text below the field in its class."""
    undescribed = [name for name, field in settings.model_fields.items() if not field.description]
    assert not undescribed, "write a line of text below each"


def test_everything_public_is_on_the_page_of_python() -> None:
    """What the packages export, but for errors and settings, which have pages of their own."""
    shown = python_api.documented()
    elsewhere = {"Settings", "__version__"} | {
        name
        for name in calotype.__all__
        if isinstance(getattr(calotype, name), type) and issubclass(getattr(calotype, name), Exception)
    }
    for package in (calotype, calotype_worker):
        missing = {name for name in package.__all__ if (package.__name__, name) not in shown} - elsewhere
        assert missing <= {"SamplerType"}, missing  # `calotype_worker` has the one of `calotype`


def test_everything_public_is_described() -> None:
    """Each class that the page shows, and each of its methods and properties."""
    silent = []
    for package, name in python_api.documented():
        cls = getattr(importlib.import_module(package), name)
        parts = {name: cls, **{f"{name}.{part}": member for part, member in python_api.members(cls)}}
        silent += [part for part, member in parts.items() if not inspect.getdoc(member)]
    assert not silent, "write a docstring for each"


def test_every_route_and_every_option_is_there() -> None:
    """Counted another way than the pages are made."""
    schema = json.loads((REFERENCE / "openapi.json").read_text())
    routes = {f"`{method.upper()} {path}`" for path, methods in schema["paths"].items() for method in methods}
    page = (REFERENCE / "http.md").read_text()
    assert routes == set(re.findall(r"^\| (`[A-Z]+ /[^`]*`)", page, re.M))
    commands = (REFERENCE / "cli.md").read_text()
    source = REFERENCE.parents[1]
    written = "".join(path.read_text() for path in (source / "producer/calotype/cli").glob("*.py"))
    written += (source / "worker/calotype_worker/__main__.py").read_text()
    options = set(re.findall(r'"(--[a-z][a-z-]+)"', written)) - {"--help"}
    assert len(options) > 20
    assert not {option for option in options if not re.search(rf"`[^`]*{option}[`, ]", commands)}
