"""The project file, the constraints and the lock agree, and hold everything that the code imports."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.lock import CONSTRAINTS, LOCK, ROOT, locked, project, without_torch

SOURCES = ("producer", "worker", "shared", "tools", "tests", "benchmarks", "examples")
# Not in the lock: builds of PyTorch differ in their files, and the latter asks for an older Celery than ours.
LEFT_OUT = {"torch", "celery-batches"}
# Where the code uses what its library does not document.
UNDOCUMENTED = {
    "celery": ("worker/calotype_worker/jobs/drain.py", "celery_state.should_stop"),
    "kombu": ("worker/calotype_worker/jobs/transport.py", "_brpop_read"),
    "diffusers": ("worker/calotype_worker/models/pipeline/copies.py", "_progress_bar_config"),
    "transformers": ("worker/calotype_train/demo/tokenizer.py", "transformers.convert_slow_tokenizer"),
    "torch": ("worker/calotype_worker/engine/compiled.py", "torch._dynamo"),
    "compel": ("worker/calotype_worker/models/clip_text.py", "get_token_ids_and_expand_weights"),
}


@pytest.fixture(scope="module")
def lock() -> dict[str, set[str]]:
    return locked(LOCK.read_text())


def pins() -> dict[str, str]:
    """Versions by package, of constraints.txt."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))


def requested() -> list[Requirement]:
    """Everything that pyproject.toml asks for."""
    about: dict[str, Any] = project()
    groups = [
        *(about["project"]["dependencies"], about["build-system"]["requires"]),
        *about["project"]["optional-dependencies"].values(),
        *about["dependency-groups"].values(),
    ]
    return [Requirement(line) for group in groups for line in group if isinstance(line, str)]


def test_each_constraint_is_what_is_locked(lock: dict[str, set[str]]) -> None:
    """One version, the same in both files; and a constraint is of something that was asked for."""
    for name, version in pins().items():
        assert name in LEFT_OUT or lock[name] == {version}, f"{name}: run make lock"
    wanted = {canonicalize_name(requirement.name) for requirement in requested()}
    assert not pins().keys() - wanted - {"celery-batches", "mkdocs", "cryptography"}, "nobody asks for these any more"


def test_the_lock_has_what_is_asked_for(lock: dict[str, set[str]]) -> None:
    """Every dependency, of every extra and group, at a version that its bounds allow."""
    for requirement in requested():
        name = canonicalize_name(requirement.name)
        if name not in {*LEFT_OUT, "calotype"}:
            assert lock[name], f"{name}: run make lock"
            assert all(version in requirement.specifier for version in lock[name]), f"{requirement}: {lock[name]}"
        elif name in pins():
            assert pins()[name] in requirement.specifier


def test_the_lock_is_complete(lock: dict[str, set[str]]) -> None:
    """What a locked package needs here is locked too, so that it can be installed without looking for more."""
    seen = 0
    for name in [*lock, "torch"]:
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # for another platform, or not installed here
            continue
        for requirement in map(Requirement, needs):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                seen += 1
                needed = canonicalize_name(requirement.name)
                assert needed in lock or needed == "torch", f"{name} needs {requirement}"
    assert seen > 200


def test_every_entry_has_hashes() -> None:
    """Or pip would refuse all of them; and no build of PyTorch is among them."""
    entries = re.split(r"^(?=[a-z0-9])", LOCK.read_text(), flags=re.MULTILINE)[1:]
    assert len(entries) > 150
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==[^\s;]+( ; [^\n]+)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+", entry), entry
    assert not {"torch", "triton", "nvidia-nccl-cu13"} & locked(LOCK.read_text()).keys()


def test_pytorch_and_its_libraries_are_left_out() -> None:
    """And what only begins with its name is not."""
    kept = "torchao==2 \\\n    --hash=b\n"
    assert without_torch(f"# by uv\ntorch==1 \\\n    --hash=a\n{kept}nvidia-nccl-cu13==3\ntriton==4\n") == kept


def imports() -> dict[str, set[str]]:
    """Names of top-level modules that the code imports, and by which files."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_the_lock_has_what_is_imported(lock: dict[str, set[str]]) -> None:
    """Nothing is there only because something else happens to bring it, of whatever version."""
    ours = {path.stem for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    ours |= {path.name for folder in SOURCES for path in (ROOT / folder).glob("*/")} | set(SOURCES)
    homes = packages_distributions()
    elsewhere = re.findall(r"^([\w.-]+)==", (ROOT / "tools/requirements.txt").read_text(), re.MULTILINE)
    known = {*lock, *LEFT_OUT, *map(canonicalize_name, elsewhere)}  # the last are of an environment of their own
    seen = set()
    for name, files in imports().items():
        if name in sys.stdlib_module_names or name in ours:
            continue
        candidates = {canonicalize_name(home) for home in homes.get(name, [name])}
        assert candidates & known, f"{name} is imported by {sorted(files)[:3]}"
        seen |= candidates
    assert {"torch", "celery", "pydantic", "hypothesis"} <= seen


@pytest.mark.parametrize("name", UNDOCUMENTED)
def test_what_is_undocumented_has_an_upper_bound(name: str) -> None:
    """The place is still there, and a user's installer takes no version that was not tried."""
    path, use = UNDOCUMENTED[name]
    assert use in (Path(ROOT) / path).read_text(), "no longer used: the bound may go"
    [requirement] = [found for found in requested() if found.name == name]
    assert any(specifier.operator == "<" for specifier in requirement.specifier), requirement
