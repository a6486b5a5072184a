"""What is in infra/ and docker-compose.yml, as far as it can be judged without running it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from copy import deepcopy
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from calotype.gateway.settings import GatewaySettings
from calotype_shared.settings import Settings, StrictSettings
from calotype_worker.settings import WorkerSettings
from tests.compose import COMPOSE, DOCKERFILES, ROOT, compose, instructions, interpolated, last_stage, seconds

INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_images_run_as_a_user_and_hold_no_secret(path: Path) -> None:
    """The last stage has a numbered user, who gets signals directly, a health check and labels; nothing secret."""
    last = dict(last_stage(path))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"]), "a number, or Kubernetes cannot tell that it is not root"
    assert isinstance(json.loads(last["ENTRYPOINT"]), list), "a shell would be process 1, and keep SIGTERM to itself"
    assert "readyz" in last["HEALTHCHECK"]
    for label in ("title", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{label}=" in last["LABEL"]
    [base] = {rest.partition(" ")[0] for word, rest in instructions(path) if word == "FROM"}
    version = dict(rest.split("=") for word, rest in instructions(path) if word == "ARG")["PYTHON"]
    assert base == "python:${PYTHON}"
    assert re.match(r"\d+\.\d+\.\d+-slim-\w+$", version)
    for word, rest in instructions(path):
        if word in ("ENV", "ARG"):
            assert not re.search(r"(SECRET|PASSWORD|TOKEN|KEY_ID)", rest), rest


def test_composed_services_have_no_more_than_they_need() -> None:
    """Read-only, without capabilities, as a user, at a version; ports on loopback; secrets without defaults."""
    ports, secrets = 0, 0
    for name, service in compose()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("privileged") is not True, name
        assert "build" in service or not service["user"].startswith("0"), name
        assert re.search(r":v?\d+\.\d+[\w.-]*$", service["image"]), name
        for port in service.get("ports", ()):
            ports += 1
            assert str(port).startswith("127.0.0.1:"), name
        for variable, value in service.get("environment", {}).items():
            if value is not None and re.search(r"PASSWORD|SECRET|ACCESS", variable):
                secrets += 1
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {variable} has a value of its own"
    assert min(ports, secrets) > 2


def test_composed_services_are_watched_and_given_time_to_stop() -> None:
    """Each has a health check, is started again, and is not killed while its jobs may still end."""
    services = compose()["services"]
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        grace = int(service.get("environment", {}).get("CALOTYPE_WORKER_GRACE_SECONDS", -30))
        assert seconds(service["stop_grace_period"]) >= grace + 30, name
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert set(services[other].get("profiles", ())) <= set(service.get("profiles", ())), (
                f"{name} waits for {other}"
            )


def test_each_composed_worker_has_its_own_device_and_spool() -> None:
    """One GPU a service, none twice, seen from inside as the first; the profile cpu asks for none."""
    workers = {name: s for name, s in compose()["services"].items() if name.startswith("worker")}
    spools = [volume for worker in workers.values() for volume in worker["volumes"] if volume.endswith(":/spool")]
    assert len(set(spools)) == len(workers)
    reserved = {
        name: worker["deploy"]["resources"]["reservations"]["devices"]
        for name, worker in workers.items()
        if "deploy" in worker
    }
    assert len(reserved) > 1
    assert [name for name, worker in workers.items() if worker["profiles"] == ["gpu"]] == list(reserved)
    for devices in reserved.values():
        assert [(d["driver"], d["capabilities"], len(d["device_ids"])) for d in devices] == [("nvidia", ["gpu"], 1)]
    assert len({devices[0]["device_ids"][0] for devices in reserved.values()}) == len(reserved)
    for name, worker in workers.items():
        assert worker["environment"]["CALOTYPE_WORKER_DEVICE"] == ("cuda:0" if name in reserved else "cpu")


def test_what_must_be_given_is_in_the_example() -> None:
    """Without a secret nothing starts, and the message says where to look; the example has exactly those."""
    needed = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    example = (ROOT / ".env.example").read_text()
    assert {"REDIS_PASSWORD", "S3_SECRET_ACCESS_KEY"} <= needed
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == needed
    optional = set(re.findall(r"\$\{(\w+):-", COMPOSE.read_text())) | {"CALOTYPE_WEBHOOK_SECRET"}
    assert set(re.findall(r"^#(\w+)=", example, re.MULTILINE)) == optional
    for name in needed:
        with pytest.raises(LookupError, match=f"{name}: see .env.example"):
            interpolated(compose(), dict.fromkeys(needed - {name}, "x"))


def test_every_variable_of_the_files_is_a_setting() -> None:
    """A name that no settings class has would stop the process that gets it."""
    classes: tuple[type[StrictSettings], ...] = (Settings, GatewaySettings, WorkerSettings)
    known = {f"{c.model_config['env_prefix']}{field}".upper() for c in classes for field in c.model_fields}
    files = [COMPOSE, ROOT / ".env.example", *(path for path in INFRA.rglob("*") if path.is_file())]
    named = {
        (name, path.relative_to(ROOT).as_posix())
        for path in files
        if path.suffix != ".pyc"
        for name in re.findall(r"CALOTYPE_[A-Z0-9_]*[A-Z0-9]", path.read_text())
    }
    assert len({name for name, _ in named}) > 15
    assert not {(name, path) for name, path in named if name not in known}


def objects() -> list[dict[str, Any]]:
    """What the base and the folder of one model hold, put together as far as rules look at it."""
    files = [*(KUBERNETES / "base").glob("*.yaml"), *(KUBERNETES / "worker").glob("*.yaml"), KUBERNETES / "loader.yaml"]
    parts = [
        yaml.safe_load((KUBERNETES / part / "kustomization.yaml").read_text()) for part in ("worker", "models/sd15")
    ]
    literals = [literal.partition("=") for part in parts for literal in part["configMapGenerator"][0]["literals"]]
    data = {name: value for name, _, value in literals}
    found: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "worker"}, "data": data}
    ]
    found += [thing for file in files for thing in yaml.safe_load_all(file.read_text()) if "metadata" in (thing or {})]
    for thing in found:
        for container in thing.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()):
            container["image"] += ":0.1.0"
        if thing["kind"] == "ScaledObject":
            [change] = yaml.safe_load(parts[1]["patches"][0]["patch"])
            thing["spec"]["triggers"][0]["metadata"]["query"] = change["value"]
    return found


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    return script("rules")


def test_manifests_keep_our_rules(rules: ModuleType) -> None:
    """All of them, before Kustomize; `make infra` renders every overlay and looks again."""
    found = objects()
    assert {"Deployment", "ScaledObject", "NetworkPolicy", "PodDisruptionBudget"} <= {thing["kind"] for thing in found}
    assert rules.problems(found) == []


def container(thing: dict[str, Any]) -> Any:
    return thing["spec"]["template"]["spec"]["containers"][0]


SPOILED: list[tuple[str, str, Callable[[dict[str, Any]], Any], str]] = [
    ("Deployment", "gateway", lambda o: container(o)["securityContext"].pop("readOnlyRootFilesystem"), "must be True"),
    ("Deployment", "worker", lambda o: o["spec"]["template"]["spec"].pop("enableServiceLinks"), "must be False"),
    ("Deployment", "worker", lambda o: container(o).update(image="calotype-worker:latest"), "has no version"),
    ("Deployment", "gateway", lambda o: container(o).pop("livenessProbe"), "has no livenessProbe"),
    ("Deployment", "gateway", lambda o: container(o)["resources"].pop("limits"), "has no limits.memory"),
    (
        "Deployment",
        "gateway",
        lambda o: container(o)["env"].append({"name": "CALOTYPE_REDIS_URL", "value": "redis://:x@y"}),
        "refer to a Secret",
    ),
    ("NetworkPolicy", "nobody", lambda o: o["spec"].update(policyTypes=["Ingress"]), "forbids all Egress"),
    ("ConfigMap", "worker", lambda o: o["data"].update(CALOTYPE_WORKER_GRACE_SECONDS="301"), "and 30 more"),
    ("ConfigMap", "worker", lambda o: o["data"].update(CALOTYPE_WORKER_MODEL="sdxl=/m"), "asks for the backlog of"),
    ("ScaledObject", "worker", lambda o: o["spec"].update(cooldownPeriod=600), "must be above the 600 s"),
    ("ScaledObject", "worker", lambda o: o["spec"]["scaleTargetRef"].update(name="other"), "no Deployment 'other'"),
    ("Deployment", "worker", lambda o: o["spec"].update(replicas=1), "every apply would bring back"),
]


@pytest.mark.parametrize(("kind", "name", "spoil", "said"), SPOILED, ids=[said for *_, said in SPOILED])
def test_a_rule_that_is_broken_is_said(
    rules: ModuleType, kind: str, name: str, spoil: Callable[[dict[str, Any]], Any], said: str
) -> None:
    """Each rule can fail, and names the object."""
    found = deepcopy(objects())
    [thing] = [thing for thing in found if thing["kind"] == kind and thing["metadata"]["name"] == name]
    spoil(thing)
    assert any(said in problem for problem in rules.problems(found)), rules.problems(found)


def test_each_model_is_asked_for_by_its_own_name() -> None:
    """A folder a model: its suffix, its label, its variable and its query agree."""
    folders = sorted(path for path in (KUBERNETES / "models").iterdir())
    assert folders
    for folder in folders:
        written = yaml.safe_load((folder / "kustomization.yaml").read_text())
        [literal] = written["configMapGenerator"][0]["literals"]
        model = literal.removeprefix("CALOTYPE_WORKER_MODEL=").partition("=")[0]
        assert model == folder.name
        assert written["nameSuffix"] == f"-{model}"
        assert written["labels"][0]["pairs"] == {"app.kubernetes.io/instance": model}
        assert f'{{model="{model}"}}' in written["patches"][0]["patch"]


def script(name: str) -> ModuleType:
    """A module of tools/, loaded by path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    return script("audit")


def test_an_audit_fails_on_what_nobody_excuses(audit: ModuleType) -> None:
    """An excuse ends; and where nothing could be asked, that is said and is no finding."""
    problem = {"id": "PYSEC-1", "aliases": ["GHSA-1"], "fix_versions": ["2.0"]}
    found = [{"name": "x", "version": "1.0", "vulns": [problem]}, {"name": "y", "version": "1.0", "vulns": []}]
    excuse = {"id": "GHSA-1", "reason": "not reachable", "until": date(2030, 1, 1)}
    assert audit.judge(found, [], today=date(2029, 1, 1)) == (
        1,
        ["FOUND: x 1.0: PYSEC-1, fixed in 2.0", "2 packages audited, 1 findings"],
    )
    assert audit.judge(found, [excuse], today=date(2029, 1, 1))[0] == 0
    assert audit.judge(found, [excuse], today=date(2030, 1, 2))[0] == 1
    assert audit.judge(found, [{**excuse, "reason": ""}], today=date(2029, 1, 1))[0] == 1
    for nothing in (None, [], [{"name": "x", "skip_reason": "not found"}]):
        status, [line] = audit.judge(nothing, [], today=date(2029, 1, 1))
        assert (status, line[:28]) == (0, "WARNING: nothing was audited")


def test_what_is_audited_are_versions_that_advisories_name(audit: ModuleType) -> None:
    pins = audit.installed()
    assert any(pin.startswith("torch==") for pin in pins)
    assert not [pin for pin in pins if "+" in pin or pin.startswith("calotype==")]
