"""`make infra`: what is in infra/ and docker-compose.yml, judged by the tools of their trades and by rules of our own.

Every overlay is rendered by kubectl; its objects are compared with the schemas of two versions of Kubernetes and of
KEDA, and held to `rules.py`. checkov looks at them and at the Dockerfiles, hadolint at the latter, and the Compose
specification's own schema at docker-compose.yml. Run by `.venv-infra/bin/python`, from `requirements.txt`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from rules import problems

INFRA = Path(__file__).parents[1] / "infra"
CHECKOV = Path(__file__).with_name("checkov.yaml")
KUBERNETES = INFRA / "kubernetes"
VERSIONS = ("1.31", "1.37")  # the oldest that knows all fields that are used, and the newest that the schemas have
DOCKERFILES = sorted((INFRA / "docker").glob("*.Dockerfile"))
COMPOSE = INFRA.parent / "docker-compose.yml"


def run(tool: str, *arguments: object) -> tuple[bool, str]:
    """Whether a tool of this environment had nothing to say against it, and what it said."""
    command = [str(Path(sys.executable).with_name(tool)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode == 0, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def parsed(query: str) -> tuple[bool, str]:
    try:
        promql_parser.parse(query)
    except ValueError as error:
        return False, f"{query}: {error}"
    return True, ""


def rendered(folder: Path) -> dict[str, str]:
    """Each overlay, and the manifests that are applied by themselves. Raises SystemExit where Kustomize cannot."""
    found = {"loader": (KUBERNETES / "loader.yaml").read_text()}
    for overlay in sorted((KUBERNETES / "overlays").iterdir()):
        worked, text = run("kubectl", "kustomize", overlay)
        if not worked:
            raise SystemExit(f"FAILED: kubectl kustomize {overlay.relative_to(INFRA.parent)}\n{text}")
        found[overlay.name] = text
    for name, text in found.items():
        (folder / f"{name}.yaml").write_text(text)
    return found


def checks(folder: Path, overlays: dict[str, str]) -> Sequence[tuple[str, bool, str]]:
    """What was looked at, whether it is well, and what was said of it."""
    done = []
    for name, text in overlays.items():
        file = folder / f"{name}.yaml"
        objects: list[dict[str, Any]] = list(filter(None, yaml.safe_load_all(text)))
        found = problems(objects)
        done.append((f"{name}: {len(objects)} objects and our rules", not found, "\n".join(found)))
        for version in VERSIONS:
            checked = run("kubernetes-validate", "--strict", "--no-warn", "--quiet", "-k", version, file)
            done.append((f"{name}: schemas of Kubernetes {version}", *checked))
        for scaled in (thing for thing in objects if thing["kind"] == "ScaledObject"):
            instance = folder / f"{name}-{scaled['metadata']['name']}.scaled.yaml"
            instance.write_text(yaml.safe_dump(scaled))
            schema = KUBERNETES / "schemas" / "scaledobject.json"
            done.append((f"{name}: schema of KEDA", *run("check-jsonschema", "--schemafile", schema, instance)))
            instance.unlink()
            done += [(f"{name}: PromQL", *parsed(each["metadata"]["query"])) for each in scaled["spec"]["triggers"]]
    for dockerfile in DOCKERFILES:
        (folder / dockerfile.name).write_text(dockerfile.read_text())
    done.append(("Dockerfiles: hadolint", *run("hadolint", *DOCKERFILES)))
    done.append(("overlays and Dockerfiles: checkov", *run("checkov", "--config-file", CHECKOV, "-d", folder)))
    compose = ("--builtin-schema", "vendor.compose-spec", COMPOSE)
    done.append(("docker-compose.yml: Compose specification", *run("check-jsonschema", *compose)))
    return done


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        done = checks(Path(folder), rendered(Path(folder)))
    for what, well, said in done:
        print(f"{'ok' if well else 'FAILED'}: {what}" + ("" if well else f"\n{said.strip()}"))
    return int(not all(well for _, well, _ in done))


if __name__ == "__main__":
    sys.exit(main())
