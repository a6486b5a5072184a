"""One trace from an HTTP request to the upload, across real processes and a collector; and nothing without one."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from calotype import Client
from calotype.embedded.ports import free_ports
from calotype_shared.errors import InvalidRequest, SettingsError
from calotype_shared.observability.logs import about
from calotype_shared.observability.otlp import export_spans
from calotype_shared.observability.telemetry import make_telemetry
from calotype_shared.observability.tracing import Telemetry, context_of, span_block, trace_id_of, traceparent_of
from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.settings import Settings
from tests.faults.harness import WorkerProcess
from tests.integration.conftest import until
from tests.observability.conftest import tiny

PROMPT = "a zebra juggling marzipan"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE}-b7ad6b7169203331-01"


class Collector:
    """Takes spans by OTLP over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []  # the service's name, the span
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    about_it = {a.key: a.value.string_value for a in group.resource.attributes}
                    for scope in group.scope_spans:
                        spans.extend((about_it["service.name"], span) for span in scope.spans)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def of(self, trace_id: str) -> dict[str, list[Any]]:
        """The spans of a trace by name."""
        found: dict[str, list[Any]] = {}
        for service, span in list(self.spans):
            if span.trace_id.hex() == trace_id:
                found.setdefault(f"{service}: {span.name}", []).append(span)
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def traced(collector: Collector) -> dict[str, str]:
    """What makes a process send its spans there at once, and log for machines."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "CALOTYPE_WORKER_LOG_FORMAT": "json",
        "CALOTYPE_GATEWAY_LOG_FORMAT": "json",
        "CALOTYPE_GATEWAY_LOG_LEVEL": "debug",
        "CALOTYPE_WORKER_LOG_LEVEL": "debug",
    }


@pytest.fixture
def gateway(environment: dict[str, str], traced: dict[str, str], tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A `calotype gateway` process: its address and its log."""
    [port] = free_ports(1)
    log = tmp_path / "gateway.log"
    command = [sys.executable, "-m", "calotype", "gateway", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**environment, **traced}, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    until(lambda: process.poll() is not None or _answers(url))
    assert process.poll() is None, log.read_text()
    yield url, log
    process.terminate()
    process.wait(120)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz").status_code == 200
    except httpx2.HTTPError:
        return False


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_one_trace_from_the_request_to_the_upload(
    gateway: tuple[str, Path],
    start_worker: Callable[..., WorkerProcess],
    traced: dict[str, str],
    collector: Collector,
    store: JobStore,
    environment: dict[str, str],
) -> None:
    """The caller's own trace, through gateway, record and worker; each span within its parent; logs name it too."""
    url, gateway_log = gateway
    worker = start_worker(CALOTYPE_WORKER_PROFILE_SECONDS="0", **traced)
    body = tiny(1, prompt=PROMPT, num_images=2, guidance_scale=7.5)
    headers = {"traceparent": CALLER, "Prefer": "wait=60"}
    job = httpx2.post(f"{url}/v1/jobs", json=body, headers=headers, timeout=90).json()
    assert job["state"] == "succeeded", job
    assert job["traceparent"].split("-")[1] == TRACE
    names = {
        "calotype-gateway: POST /v1/jobs": 1,
        "calotype-gateway: submit": 1,
        "calotype-worker: job": 1,
        "calotype-worker: fetch inputs": 1,
        "calotype-worker: prepare": 1,
        "calotype-worker: wait": 2,
        "calotype-worker: encode prompt": 2,
        "calotype-worker: denoise": 2,
        "calotype-worker: decode": 2,
        "calotype-worker: encode": 2,
        "calotype-worker: upload": 2,
        "calotype-worker: commit": 1,
    }
    until(lambda: {name: len(spans) for name, spans in collector.of(TRACE).items()} == names)
    found = collector.of(TRACE)
    [request], [submit], [attempt] = (
        found[f"calotype-{name}"] for name in ("gateway: POST /v1/jobs", "gateway: submit", "worker: job")
    )
    assert request.parent_span_id.hex() == CALLER.split("-")[2]
    assert submit.parent_span_id == request.span_id
    assert attempt.parent_span_id == submit.span_id
    for name, spans in found.items():
        for span in spans:
            assert span.start_time_unix_nano <= span.end_time_unix_nano
            if name.startswith("calotype-worker") and span is not attempt:
                assert span.parent_span_id == attempt.span_id, name
                # Notes of the engine's are by another clock; a few milliseconds do not matter.
                assert span.start_time_unix_nano >= attempt.start_time_unix_nano - 20e6, name
                assert span.end_time_unix_nano <= attempt.end_time_unix_nano + 20e6, name
    said = attributes(attempt)
    assert said["calotype.job_id"] == attributes(submit)["calotype.job_id"] == job["id"]
    assert (said["calotype.model"], said["calotype.attempt"], said["calotype.rows"]) == ("tiny", 1, 4)
    assert said["calotype.outcome"] == "succeeded"
    assert attributes(request)["http.route"] == "/v1/jobs"
    assert attributes(request)["http.response.status_code"] == 200
    assert all(b"marzipan" not in span.SerializeToString() for _, span in collector.spans)

    lines = [json.loads(line) for line in worker.text().splitlines() if line.startswith("{")]
    own = [line for line in lines if line.get("job_id") == job["id"]]
    assert {"job claimed", "job succeeded"} <= {line["event"] for line in own}
    assert all(line["trace_id"] == TRACE for line in own)
    said_by_gateway = [json.loads(line) for line in gateway_log.read_text().splitlines()]
    assert "gateway listens" in {line["event"] for line in said_by_gateway}
    assert all({"time", "level", "event"} <= set(line) for line in said_by_gateway)

    for text in (worker.text(), gateway_log.read_text()):  # at level debug
        assert "marzipan" not in text
        assert environment["CALOTYPE_S3_SECRET_ACCESS_KEY"] not in text

    # Nobody's trace goes on in another's job; what is submitted untraced begins one at the worker.
    plain = store.create([store.get(job["id"]).config.model_copy(update={"seed": 9})])
    until(lambda: store.get(plain[0]).state.final)
    assert store.get(plain[0]).traceparent is None
    until(lambda: [s for _, s in collector.spans if attributes(s).get("calotype.job_id") == plain[0]])
    [alone] = [s for _, s in collector.spans if attributes(s).get("calotype.job_id") == plain[0]]
    assert alone.trace_id.hex() != TRACE
    # A traceparent that makes no sense is no reason to fail, and looks at a job by others are not traced.
    refused = httpx2.post(f"{url}/v1/jobs", json={**body, "width": 63}, headers={"traceparent": "nonsense"})
    assert refused.status_code == 400
    until(lambda: [s for _, s in collector.spans if attributes(s).get("http.response.status_code") == 400])
    assert httpx2.get(f"{url}/v1/jobs/{job['id']}").status_code == 200
    assert not [s for _, s in collector.spans if s.name.startswith("GET")]


def test_a_dispatcher_logs_for_machines_and_has_metrics_too(
    environment: dict[str, str], traced: dict[str, str], tmp_path: Path
) -> None:
    """By the gateway's own settings."""
    [port] = free_ports(1)
    log = tmp_path / "dispatcher.log"
    variables = {**environment, **traced, "CALOTYPE_GATEWAY_METRICS_PORT": str(port)}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "calotype", "dispatcher"]
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        until(lambda: process.poll() is not None or "dispatcher runs" in log.read_text())
        assert process.poll() is None, log.read_text()
        said = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
        assert "calotype_redis_up 1.0" in said
        assert 'calotype_webhooks_total{outcome="delivered"} 0.0' in said
        assert httpx2.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    finally:
        process.terminate()
        assert process.wait(120) == 0
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events == ["dispatcher runs", "dispatcher stopped"]


class Memory:
    """A client whose spans stay here."""

    def __init__(self, settings: Settings) -> None:
        self.exporter = InMemorySpanExporter()
        self.telemetry = export_spans(service="test", exporter=self.exporter)
        self.client = Client(settings=settings, telemetry=self.telemetry)

    def spans(self) -> dict[str, Any]:
        self.telemetry.close()
        return {span.name: span for span in self.exporter.get_finished_spans()}


def test_a_client_hands_its_span_on(settings: Settings, store: JobStore) -> None:
    """One job has its own; many have one in common; an error is recorded by its kind, never by its text."""
    card = ModelCard(
        name="tiny",
        family="sd",
        version="1",
        size_multiple=8,
        native_sizes=((64, 64),),
        max_pixels=4096,
        max_prompt_tokens=77,
        samplers=("ddim",),
    )
    store.announce_model(card)
    memory = Memory(settings)
    one = memory.client.submit(PROMPT, model="tiny", sampler="ddim", width=64, height=64)
    many = memory.client.submit_many([tiny(n, sampler="ddim", width=64, height=64) for n in range(3)])
    with pytest.raises(InvalidRequest, match="width=63"), span_block(memory.telemetry.tracer, "outer"):
        memory.client.submit(PROMPT, model="tiny", sampler="ddim", width=63)
    spans = memory.spans()
    for job, name in ((one, "submit"), *((job, "submit many") for job in many)):
        context = spans[name].context
        said = store.get(job.id).traceparent or ""
        assert said.startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-"), said
    assert spans["submit"].attributes["calotype.job_id"] == one.id
    assert spans["outer"].status.description == "InvalidRequest"
    assert all("marzipan" not in span.to_json() for span in spans.values())


def test_without_a_collector_nothing_is_imported(environment: dict[str, str]) -> None:
    """Nor a part of Prometheus' client; redis-py imports parts of OpenTelemetry itself, where they are installed."""
    code = """
import sys
import calotype, calotype_shared.observability.tracing, calotype_shared.queue.job_store
from calotype_shared.settings import Settings
with calotype.Client() as client:
    try:
        client.submit("cat", model="nobody")
    except calotype.UnknownModel:
        pass
    else:
        sys.exit("nothing was asked of Redis")
ours = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "calotype_shared.observability.otlp", "prometheus_client")
print(sorted(name for name in sys.modules if name.startswith(ours)))
"""
    clean = {name: value for name, value in environment.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_what_decides_whether_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our setting first, then what the application has set up, then OpenTelemetry's own variables."""

    def traces(telemetry: Telemetry) -> bool:
        with span_block(telemetry.tracer, "work") as span:
            return span.is_recording()

    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    assert not traces(make_telemetry(Settings.load(), service="x"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    telemetry = make_telemetry(Settings.load(), service="x")
    assert traces(telemetry)
    telemetry.close()
    assert not traces(make_telemetry(Settings.load(telemetry="off"), service="x"))
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not traces(make_telemetry(Settings.load(), service="x"))
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)  # as an application's set_tracer_provider
    make_telemetry(Settings.load(telemetry="off"), service="x")
    telemetry = make_telemetry(Settings.load(), service="x")
    assert traces(telemetry)
    telemetry.close()
    assert traces(telemetry)  # the application's provider is not ours to shut down
    assert [span.name for span in exporter.get_finished_spans()] == ["work", "work"]


@pytest.mark.parametrize(
    ("said", "kept"), [(CALLER, True), ("nonsense", False), ("", False), (CALLER.replace(TRACE, "0" * 32), False)]
)
def test_an_untraced_process_passes_a_trace_on(said: str, kept: bool) -> None:
    """W3C Trace Context: what does not take part in a trace forwards its `traceparent`, if that is well-formed."""
    with span_block(Telemetry().tracer, "work", within=context_of(said)) as span:
        assert traceparent_of(span) == (said if kept else None)
        assert trace_id_of(span) == (TRACE if kept else None)


def test_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An error where our setting asks for traces, one line where only the environment does."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "calotype_shared.observability.otlp", raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with caplog.at_level(logging.WARNING):
        assert make_telemetry(Settings.load(), service="x") == Telemetry()
    assert "tracing is disabled" in caplog.text
    with pytest.raises(SettingsError, match=r"CALOTYPE_TELEMETRY='on': .*pip install 'calotype\[telemetry\]'"):
        make_telemetry(Settings.load(telemetry="on"), service="x")


def test_a_collector_that_is_away_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither who notes spans nor, for long, a process that ends."""
    heals, exported = threading.Event(), []

    class Stuck(SpanExporter):
        def export(self, spans: Any) -> Any:
            heals.wait(300)
            exported.extend(spans)

    monkeypatch.setattr("calotype_shared.observability.otlp._CLOSE_SECONDS", 0.5)
    telemetry = export_spans(service="x", exporter=Stuck())
    for _ in range(5_000):
        with span_block(telemetry.tracer, "work", attributes={"number": 1}):
            telemetry.tracer.start_span("part", start_time=1).end(2)
    telemetry.close()
    assert not exported, "it has waited for the collector"
    heals.set()


def test_log_lines_say_what_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    """Within the block, in the thread that opened it, and never in place of what a line says itself."""
    from calotype_shared.observability.logs import _Formatter

    def line(**extra: Any) -> dict[str, Any]:
        record = logging.makeLogRecord({"msg": "done", "levelname": "INFO", **extra})
        found: dict[str, Any] = json.loads(_Formatter(as_json=True).format(record))
        return found

    with about(job_id="a", trace_id="b"), about(job_id="c", trace_id=None):
        assert (line()["job_id"], line()["trace_id"]) == ("c", "b")
        assert line(job_id="d")["job_id"] == "d"
        other: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: other.append(line()))
        thread.start()
        thread.join()
        assert "job_id" not in other[0]
    assert "job_id" not in line()
    assert "color_message" not in line(color_message="x")


def test_log_lines_cannot_control_a_terminal() -> None:
    """What comes from a request is escaped: one line, no colors, no other direction of writing."""
    from calotype_shared.observability.logs import _Formatter

    record = logging.makeLogRecord(
        {"msg": "refused", "levelname": "INFO", "path": "/\x1b[31m\n2026 forged\u202e\ud800"}
    )
    assert _Formatter(as_json=False).format(record).endswith(r"refused path=/\x1b[31m\n2026 forged\u202e\ud800")
