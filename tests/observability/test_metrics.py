"""What a real worker and a real gateway export, against the vocabulary, the documents and what has happened."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from calotype.gateway.metrics import FleetCollector, RecentFleetStats
from calotype_shared.errors import RedisUnavailable, SettingsError
from calotype_shared.observability import metric_names as names
from calotype_shared.observability.admin_server import AdminServer
from calotype_shared.observability.metric_names import Metric
from calotype_shared.queue.fleet_stats import FleetStats, FleetStatsReader
from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.settings import Settings
from tests.faults.harness import WorkerProcess
from tests.integration.conftest import until
from tests.observability.conftest import Scrape, Stack, answer_of, tiny

ROOT = Path(__file__).parents[2]
ALL = (*names.WORKER, *names.FLEET, *names.GATEWAY)


def exported(scrape: Scrape) -> dict[str, tuple[str, set[str]]]:
    """Kind and labels by name, as the vocabulary spells them."""
    found = {}
    for family in scrape.families.values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    return found


@pytest.mark.parametrize("side", ["worker", "gateway"])
def test_what_is_exported_is_the_vocabulary(stack: Stack, side: str) -> None:
    """No more and no less, with the labels it names, on either side."""
    scrape, metrics = (
        (stack.scrape_worker(), names.WORKER)
        if side == "worker"
        else (stack.scrape_gateway(), (*names.FLEET, *names.GATEWAY))
    )
    found = exported(scrape)
    assert set(found) == {metric.name for metric in metrics}
    for metric in metrics:
        # Only pipeline models have networks to count by; tests/integration/test_pipeline_models.py has some.
        labels = set() if metric is names.MERGE_PATTERNS else set(metric.labels)
        assert found[metric.name] == (metric.kind, labels), metric.name


def test_the_document_lists_every_metric_and_no_other() -> None:
    """Name, kind, labels and words."""
    text = (ROOT / "docs" / "observability.md").read_text()
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `(calotype_\w+)` .*$", text, re.MULTILINE)}
    assert set(rows) == {metric.name for metric in ALL}
    for metric in ALL:
        assert rows[metric.name] == row(metric)


def row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.text} |"


def test_a_worker_tells_what_it_has_done(stack: Stack) -> None:
    """Its numbers are the engine's, and its histograms have seen every step and every file."""
    report = stack.client.workers()[0]
    scrape = stack.scrape_worker()
    assert scrape.value("calotype_images_total", outcome="succeeded") >= 6
    assert scrape.value("calotype_attempts_total", outcome="failed") == 1
    assert scrape.value("calotype_step_seconds_count", model="tiny") >= report.forward_passes > 0
    assert scrape.value("calotype_batch_rows_sum", model="tiny") >= report.rows > 0
    assert scrape.value("calotype_engine_seconds_total", phase="step") >= report.step_seconds > 0
    made = scrape.value("calotype_images_total", outcome="succeeded")
    for name in ("encode_image", "upload", "admission_wait"):
        assert scrape.value(f"calotype_{name}_seconds_count") == made
    for name in ("commit", "fetch", "encode", "decode"):
        assert scrape.value(f"calotype_{name}_seconds_count") > 0
    total, used, own = (
        scrape.value("calotype_device_memory_bytes", kind=kind) for kind in ("total", "used", "allocated")
    )
    assert total > used > own > 50e6
    assert scrape.value("calotype_worker_info", worker=report.name, model="tiny", device="cpu") == 1


def test_a_gateway_tells_of_the_fleet_and_of_itself(stack: Stack) -> None:
    """What waits for a model that nobody serves, and requests by template, never by what a stranger wrote."""
    scrape = stack.scrape_gateway()
    assert scrape.value("calotype_queue_depth", lane="bulk", model="absent") == 2
    assert scrape.value("calotype_oldest_job_age_seconds", lane="bulk", model="absent") > 0
    assert scrape.value("calotype_backlog_jobs", model="absent") == 2
    assert scrape.value("calotype_workers", model="absent") == 0
    assert scrape.value("calotype_workers", model="tiny") == 1
    assert scrape.value("calotype_unfinished_jobs", state="queued") == stack.client.counts()[JobState.QUEUED]
    assert scrape.value("calotype_jobs_total", state="failed") == 1
    assert scrape.value("calotype_dead_jobs") == 1
    assert scrape.value("calotype_webhooks_waiting") == 1
    requests = {"route": "/v1/jobs", "method": "POST", "status": "202"}
    assert scrape.value("calotype_http_requests_total", **requests) >= 7
    assert scrape.value("calotype_http_requests_total", route="/v1/jobs/{job_id}", status="404") == 1
    assert scrape.value("calotype_http_requests_total", route="(none)", method="POST", status="404") == 1
    assert scrape.value("calotype_http_request_seconds_count", route="/v1/jobs", method="POST") >= 7
    stack.gateway.http.request("PROPFIND", "/v1/jobs")
    scrape = stack.scrape_gateway()
    assert scrape.value("calotype_http_requests_total", method="other", status="405") == 1
    assert "unknown" not in scrape.text
    assert "PROPFIND" not in scrape.text


def test_an_autoscaler_gets_the_backlog_as_json(stack: Stack) -> None:
    """For one model, which may never have been heard of, or for all."""
    url = f"http://127.0.0.1:{stack.gateway_port}/backlog"
    assert json.loads(answer_of(f"{url}?model=absent")[1]) == {"queued": 2, "running": 0, "backlog": 2}
    assert json.loads(answer_of(f"{url}?model=sd-1.5")[1]) == {"queued": 0, "running": 0, "backlog": 0}
    assert json.loads(answer_of(url)[1])["models"]["absent"]["backlog"] == 2


def test_running_jobs_count_as_backlog(stack: Stack) -> None:
    """Else an autoscaler would take workers away from under their jobs."""
    job = stack.client.submit("long", model="tiny", num_inference_steps=900, sampler="ddim", seed=1)
    until(lambda: job.status().step > 0)
    try:
        until(lambda: stack.scrape_gateway().value("calotype_backlog_jobs", model="tiny") == 1)
        assert stack.scrape_worker().value("calotype_running_jobs") == 1
        assert stack.scrape_worker().value("calotype_inflight_requests") == 1
        assert stack.scrape_gateway().value("calotype_unfinished_jobs", state="running") == 1
    finally:
        job.cancel()
    until(lambda: stack.scrape_worker().value("calotype_attempts_total", outcome="lost") == 1)
    assert stack.scrape_worker().value("calotype_lost_claims_total") == 1
    assert stack.scrape_worker().value("calotype_images_total", outcome="cancelled") == 1


def test_a_refused_commit_and_a_reaped_lease_are_counted(stack: Stack) -> None:
    """A job whose claim is another's when the worker comes to commit, and whose lease has ended."""
    before = stack.scrape_worker()
    job = stack.client.submit("cat", model="tiny", num_inference_steps=40, sampler="ddim", seed=77)
    until(lambda: job.status().step > 0)
    stack.redis.hset(stack.store.keys.job(job.id), "token", "stolen")
    stack.redis.zadd(stack.store.keys.leases, {job.id: 1})
    assert job.wait(120).attempt == 2
    after = stack.scrape_worker()

    def more(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert more("calotype_lease_reaps_total", outcome="requeued") == 1
    assert more("calotype_fenced_commits_total") + more("calotype_lost_claims_total") == 1
    assert more("calotype_attempts_total", outcome="lost") == 1
    assert more("calotype_attempts_total", outcome="succeeded") == 1


def test_tenants_cannot_reach_any_of_it(stack: Stack) -> None:
    """The main port knows no metrics; the other one listens on loopback unless configured otherwise."""
    for path in ("/metrics", "/backlog"):
        assert stack.gateway.http.get(path).status_code == 404
    assert answer_of(f"http://127.0.0.1:{stack.gateway_port}/v1/jobs")[0] == 404
    server = stack.gateway.app.state.services.metrics._server._server
    assert server.server_address[0] == "127.0.0.1"


def test_probes(stack: Stack) -> None:
    """A worker that takes jobs is ready, and a gateway that reaches Redis."""
    for path in ("healthz", "readyz"):
        assert answer_of(f"http://127.0.0.1:{stack.gateway_port}/{path}") == (200, '{"status": "ok"}')
        assert answer_of(f"http://127.0.0.1:{stack.worker_port}/{path}") == (200, '{"status": "ok"}')


def test_a_draining_worker_is_alive_and_not_ready(
    start_worker: Callable[..., WorkerProcess], settings: Settings, store: JobStore
) -> None:
    """So that a probe of its life does not end it before its jobs are done."""
    worker = start_worker(CALOTYPE_WORKER_METRICS_PORT="0", CALOTYPE_WORKER_PROFILE_SECONDS="0")
    found = re.search(r"metrics_port=(\d+)", worker.text())
    assert found
    url = f"http://127.0.0.1:{found[1]}"
    config = ResolvedConfig.parse(tiny(1, num_inference_steps=900, sampler="ddim", width=64, height=64))
    [job] = store.create([config], lane=Lane.BULK)
    until(lambda: store.get(job).step > 0)
    worker.send(signal.SIGTERM)
    until(lambda: answer_of(f"{url}/readyz") == (503, '{"status": "draining"}'))
    assert answer_of(f"{url}/healthz")[0] == 200
    assert Scrape.of(f"{url}/metrics").value("calotype_worker_draining") == 1
    store.cancel(job)
    assert worker.wait() == 0


def test_while_redis_is_away_nothing_old_is_told() -> None:
    """Only that it is away; and when it is back, everything is exported again."""
    away = True
    stats = FleetStats(
        queues=(), workers={}, counts=dict.fromkeys(JobState, 3), dead=0, open_batches=0, webhooks_waiting=0
    )

    def take() -> FleetStats:
        if away:
            raise RedisUnavailable("it is away")
        return stats

    now = 0.0
    recent = RecentFleetStats(take, clock=lambda: now)
    registry = CollectorRegistry()
    registry.register(FleetCollector(recent))
    said = generate_latest(registry).decode()
    assert "calotype_redis_up 0.0" in said
    assert "calotype_dead_jobs" not in said
    assert recent.problem() == "it is away"
    away = False
    assert "calotype_dead_jobs 0.0" in generate_latest(registry).decode()
    away = True
    assert recent.problem() is None, "it is asked once a second"
    now = 1.1
    assert "calotype_redis_up 0.0" in generate_latest(registry).decode()


def test_the_oldest_wait_is_found_near_the_front_of_a_long_line(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tenants, hundreds of jobs of different cost, some of them claimed: the same as by looking at all."""
    reader = FleetStatsReader(store.redis, key_prefix=store.keys.prefix)

    def jobs(count: int, steps: int) -> list[ResolvedConfig]:
        return [
            ResolvedConfig(prompt="cat", model="tiny", seed=n, width=64, height=64, num_inference_steps=steps)
            for n in range(count)
        ]

    now = time.time()
    for tenant, count, steps, age, apart in (("a", 150, 30, 5000, 10), ("b", 250, 4, 900, 1), ("c", 3, 50, 3000, 50)):
        ids = store.create(jobs(count, steps), lane=Lane.BULK, tenant=tenant)
        for number, job_id in enumerate(ids):  # as if they had come one after the other
            store.redis.hset(store.keys.job(job_id), "queued_at", int((now - age + number * apart) * 1e6))
    for number in range(100):
        assert store.claim("tiny.bulk", worker="w", lease_seconds=60)
        if number % 9:
            continue
        before = time.time()
        [line] = reader.take().queues
        after = time.time()
        waiting = store.redis.zrange(store.keys.waiting("tiny.bulk"), 0, -1)
        oldest = min(record.queued_at for record in store.get_many(list(map(str, waiting))) if record)
        assert before - oldest - 0.01 <= line.oldest_seconds <= after - oldest + 0.01
        assert line.waiting == len(waiting)
    assert (line.model, line.lane, line.running) == ("tiny", "bulk", 100)
    monkeypatch.setattr("calotype_shared.queue.fleet_stats._LEASES", 7)
    assert reader.take().queues[0].running == 100, "seven stand for a hundred"


@pytest.fixture
def server() -> Iterator[AdminServer]:
    def broken(_: object) -> None:
        raise RuntimeError("a bug")

    server = AdminServer("127.0.0.1", 0, {"/broken": broken}, setting="X")  # type: ignore[dict-item]
    server.start()
    yield server
    server.close()


def test_a_bug_in_a_route_is_an_answer_and_a_taken_port_is_told(server: AdminServer) -> None:
    """Neither shows what was wrong inside; the second names the setting."""
    assert answer_of(f"http://127.0.0.1:{server.port}/broken") == (500, '{"error": "a bug; the log has the details"}')
    with pytest.raises(
        SettingsError, match=rf"X={server.port}: cannot listen at '127.0.0.1' \(Address already in use\)"
    ):
        AdminServer("127.0.0.1", server.port, {}, setting="X")
