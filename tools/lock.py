"""Writes `requirements.lock`: every package of the project's own environment, with the hashes of its files.

`make lock` keeps the versions of the lock that is there, as far as `pyproject.toml` and `constraints.txt` allow;
`python -m tools.lock --upgrade` takes the newest ones. Both files are read by uv, which resolves for every platform and
for each Python that the project supports at once.

PyTorch and its CUDA libraries are left out. A CPU build and a CUDA build of one version have different files, and pip
accepts no requirement without a hash beside others that have one. `constraints.txt` has PyTorch's version.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK, CONSTRAINTS, PROJECT = ROOT / "requirements.lock", ROOT / "constraints.txt", ROOT / "pyproject.toml"
_OF_TORCH = re.compile(r"(torch|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)")
_ENTRY = re.compile(r"^(?=[a-z0-9])", re.MULTILINE)
_HEAD = """\
# Every package of the project's own environment, with the hashes of its files. Written by `make lock` from
# pyproject.toml and constraints.txt. PyTorch and its CUDA libraries are left out, as each build has other files:
#   pip install -c constraints.txt torch
#   pip install --require-hashes --no-deps -r requirements.lock
"""


def project() -> dict[str, Any]:
    """`pyproject.toml` as it is read."""
    return tomllib.loads(PROJECT.read_text())


def locked(text: str) -> dict[str, set[str]]:
    """The versions of each package of a lock. Several where they depend on the platform or on Python."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==([^\s;]+)", text, re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def without_torch(text: str) -> str:
    """A resolution as uv writes it, without what belongs to a build of PyTorch."""
    entries = _ENTRY.split(text)[1:]  # the first is uv's own head
    return "".join(entry for entry in entries if not _OF_TORCH.fullmatch(entry.partition("==")[0]))


def compile_lock(options: list[str]) -> str:
    """Resolve anew; returns the text of the lock. Raises CalledProcessError where there is no solution."""
    about = project()
    wanted = [
        *(f"--extra={name}" for name in about["project"]["optional-dependencies"]),
        *(f"--group={name}" for name in about["dependency-groups"]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / LOCK.name
        if LOCK.exists():
            resolved.write_text(LOCK.read_text())  # uv prefers the versions that it finds there
        subprocess.run(
            [
                *(sys.executable, "-m", "uv", "pip", "compile", PROJECT.name, *wanted, *options),
                *("--constraints", CONSTRAINTS.name, "--universal", "--python-version", "3.11"),
                *("--generate-hashes", "--no-annotate", "--quiet", "--output-file", str(resolved)),
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return _HEAD + without_torch(resolved.read_text())


def main(options: list[str]) -> int:
    try:
        text = compile_lock(options)
    except subprocess.CalledProcessError as error:
        return error.returncode  # uv has said why
    LOCK.write_text(text)
    print(f"{LOCK.name}: {len(locked(text))} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
