"""A worker's metrics port: what its probes find, and that watching never touches the step loop."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from calotype_shared.observability.admin_server import AdminRequest
from calotype_shared.observability.metrics import new_registry, scraped
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.settings import Settings
from calotype_worker.engine import Engine
from calotype_worker.engine.trace import Tracers
from calotype_worker.jobs.heartbeat import Heartbeat
from calotype_worker.observability.admin import WorkerAdmin
from calotype_worker.observability.counters import Counters
from calotype_worker.observability.metrics import SpanMeters
from calotype_worker.settings import WorkerSettings
from tests.integration.conftest import until
from tests.unit.test_engine import request


def asked(port: int | None, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, json.loads(answer.read())["status"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["status"]


def test_probes_find_a_stuck_heartbeat_and_an_ended_engine(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are not misled by Redis being away, for a restart would not help against that."""
    monkeypatch.setattr("calotype_worker.observability.admin._SILENCE_SECONDS", 1.0)
    stuck, stop_being_stuck = threading.Event(), threading.Event()
    engine = make_engine()
    away = JobStore(connect_redis(Settings.load(redis_url="redis://127.0.0.1:1/0")))

    def report() -> None:
        if stuck.is_set():
            stop_being_stuck.wait(120)
        away.ping()  # raises RedisUnavailable

    heartbeat = Heartbeat(
        away, lease_seconds=20, progress=engine.progress, stop_request=engine.cancel, report=report, counters=Counters()
    )
    admin = WorkerAdmin(WorkerSettings(metrics_port=0))
    admin.start()
    try:
        assert asked(admin.port, "/healthz") == (503, "starting")
        heartbeat.start()
        admin.watch(
            info={"worker": "w", "model": "tiny", "device": "cpu", "version": "1"},
            device="cpu",
            engine=engine,
            silent_seconds=lambda: heartbeat.silent_seconds,
            counters=Counters(),
            gauges={},
            not_ready=lambda: None,
        )
        monkeypatch.setattr("calotype_worker.jobs.heartbeat._BACKOFF_SECONDS", 0.1)
        until(lambda: asked(admin.port, "/healthz") == (200, "ok"))
        assert asked(admin.port, "/readyz") == (200, "ok")
        stuck.set()
        until(lambda: asked(admin.port, "/healthz")[1].startswith("the heartbeat's thread has been stuck"))
        stop_being_stuck.set()
        stuck.clear()
        until(lambda: asked(admin.port, "/healthz") == (200, "ok"))
        engine.stop()
        assert asked(admin.port, "/healthz") == (503, "the engine's thread has ended")
        assert asked(admin.port, "/readyz")[0] == 503
    finally:
        stop_being_stuck.set()
        heartbeat.stop()
        admin.close()


def test_a_tracer_that_raises_is_dropped_and_nobody_notices(make_engine: Callable[..., Engine]) -> None:
    """The requests finish, and the tracer beside it has seen every step."""

    class Broken:
        calls = 0

        def span(self, *_: Any, **__: Any) -> None:
            self.calls += 1
            raise RuntimeError("a bug")

        def wait(self, *_: Any) -> None:
            raise RuntimeError("a bug")

    broken, registry = Broken(), new_registry()
    engine = make_engine(trace=Tracers([broken, SpanMeters(registry, ["tiny"])]))
    futures = [engine.submit(request(f"r{number}", steps=3 + number)) for number in range(3)]
    for future in futures:
        future.result(120)
    engine.stop()
    said = scraped(registry, AdminRequest()).body.decode()
    stats = engine.stats()
    assert f'calotype_step_seconds_count{{model="tiny"}} {float(stats.forward_passes)}' in said
    assert f'calotype_batch_rows_sum{{model="tiny"}} {float(stats.rows)}' in said
    assert "calotype_admission_wait_seconds_count 3.0" in said
    assert broken.calls == 1
