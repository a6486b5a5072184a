"""What manifests of ours must have, beyond what schemas and general scanners know. Pure functions of parsed YAML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Object = Mapping[str, Any]

SLACK_SECONDS = 30  # after a worker's grace period, to hand back what is left and end
_SECRET = re.compile(r"PASSWORD|SECRET|ACCESS_KEY|REDIS_URL|TOKEN")


def problems(objects: Sequence[Object]) -> list[str]:
    """Sentences, each about one object; none if all is well."""
    found = [f"{name(thing)}: {said}" for thing in objects for rule in RULES for said in rule(thing, objects)]
    return sorted(set(found))


def name(thing: Object) -> str:
    return f"{thing['kind']} {thing['metadata']['name']}"


def pod(thing: Object) -> Mapping[str, Any] | None:
    """What its pods are; None where it has none."""
    if thing["kind"] == "Pod":
        return {"metadata": thing["metadata"], "spec": thing["spec"]}
    template: Mapping[str, Any] | None = thing.get("spec", {}).get("template")
    return template


def _no_secrets(thing: Object, _: Sequence[Object]) -> Iterator[str]:
    if thing["kind"] == "Secret":
        yield "secrets are made by hand, not written into files"
    if thing["kind"] == "ConfigMap":
        yield from (f"{key} belongs into a Secret" for key in thing.get("data", {}) if _SECRET.search(key))
    for container in _containers(thing):
        for variable in container.get("env", ()):
            if _SECRET.search(variable["name"]) and "value" in variable:
                yield f"{variable['name']} is written down; refer to a Secret"


def _hardened(thing: Object, _: Sequence[Object]) -> Iterator[str]:
    template = pod(thing)
    if template is None:
        return
    spec = template["spec"]
    wanted = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # its variables, CALOTYPE_…_PORT among them, would be taken for settings
        "securityContext.runAsNonRoot": True,
        "securityContext.seccompProfile.type": "RuntimeDefault",
    }
    yield from _differences(spec, wanted)
    for container in _containers(thing):
        wanted = {
            "securityContext.allowPrivilegeEscalation": False,
            "securityContext.readOnlyRootFilesystem": True,
            "securityContext.capabilities.drop": ["ALL"],
        }
        yield from _differences(container, wanted)
        if not re.search(r":[\w.-]*\d[\w.-]*$", container["image"]):
            yield f"image {container['image']} has no version"
        for bound in ("requests.cpu", "requests.memory", "limits.memory", "limits.ephemeral-storage"):
            if _at(container.get("resources", {}), bound) is None:
                yield f"container {container['name']} has no {bound}"
        if thing["kind"] != "Pod":
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe not in container:
                    yield f"container {container['name']} has no {probe}"


def _reachable_by_few(thing: Object, objects: Sequence[Object]) -> Iterator[str]:
    """Where there are policies, one must be against everything."""
    policies = [other for other in objects if other["kind"] == "NetworkPolicy"]
    if pod(thing) is None or not policies:
        return
    for direction in ("Ingress", "Egress"):
        if not any(
            policy["spec"]["podSelector"] == {}
            and direction in policy["spec"]["policyTypes"]
            and not policy["spec"].get(direction.lower())
            for policy in policies
        ):
            yield f"no policy forbids all {direction} by default"


def _time_to_drain(thing: Object, objects: Sequence[Object]) -> Iterator[str]:
    template = pod(thing)
    grace = _variables(thing, objects).get("CALOTYPE_WORKER_GRACE_SECONDS")
    if template is None or grace is None:
        return
    given = template["spec"].get("terminationGracePeriodSeconds", 30)
    if given < float(grace) + SLACK_SECONDS:
        wanted = f"CALOTYPE_WORKER_GRACE_SECONDS={grace} and {SLACK_SECONDS} more"
        yield f"terminationGracePeriodSeconds={given}: must be {wanted}"


def _scaled_by_its_model(thing: Object, objects: Sequence[Object]) -> Iterator[str]:
    if thing["kind"] != "ScaledObject" or len(objects) == 1:
        return
    spec, wanted = thing["spec"], thing["spec"]["scaleTargetRef"]["name"]
    target = next((o for o in objects if o["kind"] == "Deployment" and o["metadata"]["name"] == wanted), None)
    if target is None:
        yield f"there is no Deployment {wanted!r} to scale"
        return
    models = [entry.partition("=")[0] for entry in _variables(target, objects)["CALOTYPE_WORKER_MODEL"].split(",")]
    for trigger in spec["triggers"]:
        asked = re.findall(r'model=~?"([^"]*)"', trigger["metadata"]["query"])
        if asked != ["|".join(models)]:
            yield f"asks for the backlog of {asked}, and its workers serve {models}"
    probe = _containers(target)[0]["startupProbe"]
    load = probe["periodSeconds"] * probe["failureThreshold"]
    if spec.get("cooldownPeriod", 300) <= load:
        yield f"cooldownPeriod={spec.get('cooldownPeriod')}: must be above the {load} s that a model may take to load"
    if "replicas" in target["spec"]:
        yield f"{name(target)} has replicas of its own, which every apply would bring back"


RULES: tuple[Callable[[Object, Sequence[Object]], Iterator[str]], ...] = (
    _no_secrets,
    _hardened,
    _reachable_by_few,
    _time_to_drain,
    _scaled_by_its_model,
)


def _containers(thing: Object) -> list[Mapping[str, Any]]:
    spec = (pod(thing) or {"spec": {}})["spec"]
    return [*spec.get("initContainers", ()), *spec.get("containers", ())]


def _variables(thing: Object, objects: Sequence[Object]) -> dict[str, str]:
    """As its first container sees them, but for secrets."""
    maps = {o["metadata"]["name"]: o.get("data", {}) for o in objects if o["kind"] == "ConfigMap"}
    found: dict[str, str] = {}
    for container in _containers(thing)[:1]:
        for source in container.get("envFrom", ()):
            found |= maps.get(source.get("configMapRef", {}).get("name"), {})
        found |= {variable["name"]: variable.get("value", "") for variable in container.get("env", ())}
    return found


def _differences(value: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for path, expected in wanted.items():
        if _at(value, path) != expected:
            yield f"{path} is {_at(value, path)!r}; must be {expected!r}"


def _at(value: Mapping[str, Any], path: str) -> Any:
    found: Any = value
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
