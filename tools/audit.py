"""`make audit`: asks for known vulnerabilities of everything installed beside us, by pip-audit.

Fails on a finding that `audit-ignore.toml` does not excuse, or no longer: an entry has a reason and a last day. Where
the advisories cannot be reached it says loudly that nothing was audited, and does not fail: that is not a finding.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

IGNORED = Path(__file__).with_name("audit-ignore.toml")
OURS = "calotype"


def installed() -> list[str]:
    """Pins of what is installed; a build's local version (`+cpu`) is not a version that advisories name."""
    found = {d.metadata["Name"]: d.version.partition("+")[0] for d in distributions() if d.metadata["Name"]}
    return sorted(f"{name}=={version}" for name, version in found.items() if name != OURS)


def ask(pins: list[str]) -> list[dict[str, Any]] | None:
    """What pip-audit says of each package; None where it could not ask."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        command = ["pip_audit", "--requirement", file.name, "--no-deps", "--disable-pip", "--format", "json"]
        run = subprocess.run(
            [sys.executable, "-m", *command, "--progress-spinner", "off"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    try:
        dependencies: list[dict[str, Any]] = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(run.stderr.strip()[-2000:], file=sys.stderr)
        return None
    return dependencies


def judge(
    dependencies: list[dict[str, Any]] | None, excuses: list[dict[str, Any]], *, today: date
) -> tuple[int, list[str]]:
    """Exit status, and lines for people."""
    audited = [d for d in dependencies or () if "vulns" in d and "skip_reason" not in d]
    if not audited:
        return 0, [
            "WARNING: nothing was audited: the advisories cannot be reached from here. Run `make audit` elsewhere."
        ]
    excused = {excuse["id"] for excuse in excuses if excuse["until"] >= today and excuse["reason"]}
    lines, bad = [], 0
    for dependency in audited:
        for problem in dependency["vulns"]:
            names = {problem["id"], *problem.get("aliases", ())}
            word = "excused" if names & excused else "FOUND"
            bad += word == "FOUND"
            fixed = ", ".join(problem.get("fix_versions", ())) or "no version"
            lines.append(f"{word}: {dependency['name']} {dependency['version']}: {problem['id']}, fixed in {fixed}")
    left = len(dependencies or ()) - len(audited)
    lines.append(
        f"{len(audited)} packages audited, {bad} findings" + (f"; {left} could not be audited" if left else "")
    )
    return int(bad > 0), lines


def main() -> int:
    excuses = tomllib.loads(IGNORED.read_text()).get("ignore", [])
    status, lines = judge(ask(installed()), excuses, today=date.today())
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
