"""Rules, their tests and the dashboard: by promtool, and against a Prometheus that scrapes real targets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from calotype.embedded.ports import free_ports
from calotype_shared.observability import metric_names as names
from tests.integration.conftest import until
from tests.observability.conftest import Stack, answer_of, tiny

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra" / "observability"
RULES = sorted((INFRA / "prometheus" / "rules").glob("*.yml"))
DASHBOARDS = sorted((INFRA / "grafana" / "dashboards").glob("*.json"))
TARGET_LABELS = {"job", "instance"}


def rules(kind: str) -> list[dict[str, Any]]:
    """All `alert` or `record` rules."""
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def panels() -> list[tuple[str, str]]:
    """Title and query, with the variables as Grafana would fill them in."""
    found = []
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
                assert "$" not in query, query
                found.append((panel["title"], query))
    return found


QUERIES = [
    *panels(),
    *((rule["alert"], rule["expr"]) for rule in rules("alert")),
    *((rule["record"], rule["expr"]) for rule in rules("record")),
]


def test_every_query_uses_names_and_labels_that_are_scraped(stack: Stack) -> None:
    """Of the union of a real worker's and a real gateway's series, and of what rules record from those."""
    known: dict[str, set[str]] = {"up": set(TARGET_LABELS)}
    values: dict[tuple[str, str], set[str]] = {}
    for scrape in (stack.scrape_worker(), stack.scrape_gateway()):
        for name, labels in scrape.labels.items():
            known[name] = labels | TARGET_LABELS
    for metric in (*names.WORKER, *names.FLEET, *names.GATEWAY):
        if metric.values:
            values[metric.name, metric.labels[0]] = set(metric.values)
    for rule in rules("record"):
        by = re.search(r"by \(([^)]*)\)", rule["expr"])
        assert by, rule["record"]
        known[rule["record"]] = set(re.split(r",\s*", by[1]))
    assert len(QUERIES) > 60
    for title, query in QUERIES:
        bare = re.sub(r'"[^"]*"', '""', query)
        used = set(re.findall(r"\b(calotype[_:][\w:]+|up)\b(?!\s*\()", bare))
        assert used, title
        assert used <= set(known), f"{title}: {used - set(known)} is not scraped"
        for name, matchers in re.findall(r"\b(calotype[_:][\w:]+|up)\{([^}]*)\}", query):
            for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
                assert label in known[name], f"{title}: {name} has no label {label}"
                allowed = values.get((name, label))
                assert not allowed or operator != "=" or value in allowed, f"{title}: {label} is never {value}"
        for grouping in re.findall(r"\b(?:by|on|ignoring|without) \(([^)]*)\)", query):
            asked = {label for label in re.split(r",\s*", grouping) if label} - {"le"}
            labels = set().union(*(known[name] for name in used))
            assert asked <= labels, f"{title}: nothing has {asked - labels}"


def test_every_alert_is_told_in_full_and_has_its_tests() -> None:
    """Words for people, a section in the document, a case in which it fires and one in which it does not."""
    document = (ROOT / "docs" / "observability.md").read_text()
    cases = yaml.safe_load((INFRA / "prometheus" / "tests" / "alerts.yml").read_text())["tests"]
    outcomes: dict[str, set[bool]] = {}
    for case in cases:
        for test in case.get("alert_rule_test", ()):
            outcomes.setdefault(test["alertname"], set()).add(bool(test["exp_alerts"]))
    alerts = rules("alert")
    assert len({rule["alert"] for rule in alerts}) == len(alerts) >= 12
    assert set(outcomes) == {rule["alert"] for rule in alerts}
    for rule in alerts:
        name = rule["alert"]
        assert outcomes[name] == {True, False}, name
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, name
        assert rule["annotations"]["runbook"] == f"docs/observability.md#{name.lower()}"
        assert f"\n#### {name}\n" in document, name
        assert rule["labels"]["severity"] in ("warning", "critical"), name
    recorded = {rule["record"] for rule in rules("record")}
    assert recorded == {test["expr"] for case in cases for test in case.get("promql_expr_test", ())}


def test_grafana_finds_its_datasource_and_no_panel_lies_on_another() -> None:
    """Its files name one datasource by one uid; ids and places are unique."""
    [source] = yaml.safe_load((INFRA / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    [provider] = yaml.safe_load((INFRA / "grafana/provisioning/dashboards/calotype.yml").read_text())["providers"]
    assert provider["type"] == "file"
    [board] = [json.loads(file.read_text()) for file in DASHBOARDS]
    text = json.dumps(board)
    assert set(re.findall(r'"datasource": \{"type": "prometheus", "uid": "(\w+)"\}', text)) == {source["uid"]}
    assert text.count('"datasource"') == text.count(f'"uid": "{source["uid"]}"')
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert (x, y) not in taken, f"{panel['title']} lies on {taken.get((x, y))}"
                taken[x, y] = panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.promtool
def test_rules_by_promtool() -> None:
    """The configuration is valid, and every rule does in its tests what they say."""
    for command in (
        ["promtool", "check", "config", str(INFRA / "prometheus" / "prometheus.yml")],
        ["promtool", "test", "rules", str(INFRA / "prometheus" / "tests" / "alerts.yml")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.promtool
def test_a_rule_that_is_wrong_fails_its_tests(tmp_path: Path) -> None:
    """A threshold that was moved is found."""
    copied = tmp_path / "prometheus"
    shutil.copytree(INFRA / "prometheus", copied)
    file = copied / "rules" / "alerts.yml"
    text = file.read_text().replace('lane="interactive"} > 60', 'lane="interactive"} > 600')
    assert text != file.read_text()
    file.write_text(text)
    command = ["promtool", "test", "rules", str(copied / "tests" / "alerts.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "CalotypeInteractiveWaitLong" in done.stdout + done.stderr


@pytest.fixture
def prometheus(stack: Stack, tmp_path: Path) -> Iterator[str]:
    """A Prometheus with our rules, which has scraped the real worker and the real gateway a few times."""
    config = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(file) for file in RULES]
    by_job = {"calotype-gateway": stack.gateway_port, "calotype-worker": stack.worker_port}
    assert {job["job_name"] for job in config["scrape_configs"]} == set(by_job)
    config["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for job, port in by_job.items()
    ]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={file}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or _is_ready(url))
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield url
    finally:
        process.kill()
        process.wait()
        log.close()


def _is_ready(url: str) -> bool:
    try:
        return answer_of(f"{url}/-/ready")[0] == 200
    except OSError:
        return False


def ask(url: str, query: str) -> list[Any]:
    """The samples of an instant query."""
    status, text = answer_of(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    assert status == 200, f"{query}: {text}"
    found: list[Any] = json.loads(text)["data"]["result"]
    return found


@pytest.mark.promtool
def test_a_real_prometheus_answers_every_panel(stack: Stack, prometheus: str) -> None:
    """None of them is refused or empty, and numbers are those of what was done meanwhile."""
    until(lambda: len(ask(prometheus, "up == 1")) == 2)
    until(lambda: ask(prometheus, "calotype:backlog:jobs"))
    before = ask(prometheus, 'sum(calotype_images_total{outcome="succeeded"})')[0]["value"][1]
    jobs = stack.client.submit_many([tiny(100 + number) for number in range(4)])
    stack.client.wait([job.id for job in jobs], 120)
    done = 'sum(calotype_images_total{outcome="succeeded"})'
    until(lambda: float(ask(prometheus, done)[0]["value"][1]) == float(before) + 4)
    ends, empty = time.monotonic() + 30, [("all", "")]
    while empty and time.monotonic() < ends:
        empty = [(title, query) for title, query in panels() if not ask(prometheus, query)]
        time.sleep(0.3)
    assert not empty
    state = json.loads(answer_of(f"{prometheus}/api/v1/rules")[1])["data"]["groups"]
    health = {rule["name"]: rule["health"] for group in state for rule in group["rules"]}
    assert set(health.values()) == {"ok"}, health
    pending = {rule["name"] for group in state for rule in group["rules"] if rule.get("state") in ("pending", "firing")}
    assert "CalotypeNoWorkers" in pending, "two jobs wait for a model that nobody serves"
