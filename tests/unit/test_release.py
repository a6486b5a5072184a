"""Version, changelog and workflows agree, and the checks before a release find what must not go out."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GOOD = "# Changelog\n\n## [Unreleased]\n\n### Added\n- A.\n\n## [1.0.0] - 2026-01-31\n\n### Fixed\n- B.\n"


def load_release() -> ModuleType:
    """`tools/release.py`, loaded by path."""
    spec = importlib.util.spec_from_file_location("release", ROOT / "tools" / "release.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def release() -> ModuleType:
    return load_release()


def test_the_changelog_knows_the_version(release: ModuleType) -> None:
    """The newest entry is that of pyproject.toml, or what is to be the next is still unreleased."""
    entries = release.changelog((ROOT / "CHANGELOG.md").read_text())
    assert "Unreleased" in entries or next(iter(entries)) == release.version()
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", release.version())


def test_a_tag_without_its_entry_is_refused(release: ModuleType) -> None:
    """Neither another version's tag nor one that the changelog does not know; a candidate needs no entry."""
    release.check_tag("v1.0.0", version="1.0.0", text=GOOD)
    release.check_tag("v1.1.0rc1", version="1.1.0rc1", text=GOOD)
    for tag, version, problem in (
        ("v1.0.1", "1.0.0", "is not v1.0.0"),
        ("1.0.0", "1.0.0", "is not v1.0.0"),
        ("v1.1.0", "1.1.0", r"newest entry is not \[1.1.0\]"),
    ):
        with pytest.raises(release.Wrong, match=problem):
            release.check_tag(tag, version=version, text=GOOD)
    assert release.notes("v1.0.0", GOOD) == "### Fixed\n- B."
    assert release.notes("v1.1.0rc1", GOOD) == "### Added\n- A."
    with pytest.raises(release.Wrong, match=r"no entry \[2.0.0\]"):
        release.notes("v2.0.0", GOOD)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (GOOD.replace(" - 2026-01-31", ""), r"\[1.0.0\] needs a date"),
        (GOOD.replace("## [1.0.0]", "## 1.0.0"), "a heading is neither"),
        (GOOD.replace("[Unreleased]", "[2.0.0] - 2026-02-01") + "\n## [Unreleased]\n", r"\[Unreleased\] comes first"),
    ],
)
def test_a_changelog_of_another_form_is_refused(release: ModuleType, bad: str, problem: str) -> None:
    """As tools read it: Keep a Changelog."""
    with pytest.raises(release.Wrong, match=problem):
        release.changelog(bad)


ABOUT = "Metadata-Version: 2.4\nName: calotype\nVersion: 1.0.0\nDescription-Content-Type: text/markdown\n\n# It\n"


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """Makes a wheel and an sdist of these files."""

    def pack(*, about: str = ABOUT, wheel: tuple[str, ...] = (), sdist: tuple[str, ...] = ()) -> Path:
        with zipfile.ZipFile(tmp_path / "calotype-1.0.0-py3-none-any.whl", "w") as archive:
            for name in (
                "calotype/a.py",
                "calotype_shared/a.py",
                "calotype_train/a.py",
                "calotype_worker/a.py",
                *wheel,
            ):
                archive.writestr(name, "")
            archive.writestr("calotype-1.0.0.dist-info/METADATA", about)
        with tarfile.open(tmp_path / "calotype-1.0.0.tar.gz", "w:gz") as archive:
            for name in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", *sdist):
                data = about.encode() if name == "PKG-INFO" else b""
                info = tarfile.TarInfo(f"calotype-1.0.0/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return tmp_path

    return pack


def test_distributions_that_must_not_go_out_are_refused(release: ModuleType, pack: Callable[..., Path]) -> None:
    """What is missing, foreign, secret, of another version, or would be refused by the index."""
    good = release.check_distributions(pack(), version="1.0.0")
    assert [line.split("  ")[1] for line in good] == ["calotype-1.0.0-py3-none-any.whl", "calotype-1.0.0.tar.gz"]
    bad: list[tuple[dict[str, Any], str, str]] = [
        ({}, "1.0.1", "version 1.0.0, not 1.0.1"),
        ({"wheel": ("tests/a.py",)}, "1.0.0", "holds .*tests"),
        ({"wheel": ("calotype/.env",)}, "1.0.0", "may be secret"),
        ({"sdist": ("infra/server.pem",)}, "1.0.0", "may be secret"),
        ({"about": ABOUT.replace("text/markdown", "text/html")}, "1.0.0", "metadata: .*html"),
        ({"about": ABOUT.replace("Name: calotype\n", "")}, "1.0.0", "metadata: .*name"),
        ({"about": ABOUT.replace("# It\n", "")}, "1.0.0", "not markdown with a text"),
    ]
    for files, version, problem in bad:
        with pytest.raises(release.Wrong, match=problem):
            release.check_distributions(pack(**files), version=version)
    (pack() / "calotype-0.9.0.tar.gz").touch()
    with pytest.raises(release.Wrong, match="1 wheels and 2 sdists"):
        release.check_distributions(pack(), version="1.0.0")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_do_no_more_than_they_must(path: Path) -> None:
    """Nothing by default but reading; actions by full version; bounded; no secret but the run's own token."""
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    assert "secrets." not in text
    assert "pull_request_target" not in text
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120, name
        assert job["runs-on"] != "self-hosted"
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w.-]+/[\w./-]+@v\d+\.\d+\.\d+", step["uses"]), step["uses"]
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", ""), "an expression in a script could be somebody's script"


def test_a_release_is_tested_before_it_is_published() -> None:
    """Everything waits for the one job that checks the tag and runs all tests; each right is where it is used."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    runs = [step.get("run", "") for step in jobs["build"]["steps"]]
    assert [run for run in runs if run.startswith("make")] == [
        "make check",
        "make test",
        "make test-slow",
        "make build",
    ]
    assert any("tools/release.py tag" in run for run in runs)
    writes = {
        name: sorted(right for right, level in job.get("permissions", {}).items() if level == "write")
        for name, job in jobs.items()
    }
    assert writes == {
        "build": [],
        "attest": ["attestations", "id-token"],
        "pypi": ["id-token"],
        "images": ["attestations", "id-token", "packages"],
        "announce": ["contents"],
    }
    needs = {name: job.get("needs", []) for name, job in jobs.items() if name != "build"}
    assert needs.pop("announce") == ["pypi", "images"]
    assert all("build" in before for before in needs.values())


def test_workflows_are_what_the_service_takes() -> None:
    """By its published schema, and by an auditor of workflows, both offline."""
    tools = Path(sys.executable).parent
    commands: list[list[str | Path]] = [
        [tools / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS],
        [tools / "zizmor", "--offline", "--quiet", ROOT / ".github"],
    ]
    for command in commands:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
