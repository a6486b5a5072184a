"""Every metric that Calotype exports: its name, kind, labels and meaning. docs/observability.md has the same table.

Names follow Prometheus' conventions: base units, `_total` for what only grows. No label holds a tenant, a job or
anything a user wrote, so the number of series depends on models and routes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "calotype_"

# Seconds: a step of a small model takes milliseconds, one of a large model on a slow device tens of seconds.
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One name. `values` are all that its first label can have, where they are few and known."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, text: str, *labels: str, values: tuple[str, ...] = ()) -> Metric:
    return Metric(name=f"{PREFIX}{name}_total", kind="counter", text=text, labels=labels, values=values)


def _gauge(name: str, text: str, *labels: str, values: tuple[str, ...] = ()) -> Metric:
    return Metric(name=PREFIX + name, kind="gauge", text=text, labels=labels, values=values)


def _histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SHORT) -> Metric:
    return Metric(name=PREFIX + name, kind="histogram", text=text, labels=labels, buckets=buckets)


# ---- a worker: its engine

WORKER_INFO = _gauge("worker_info", "1; its labels say which worker this is", "worker", "model", "device", "version")
BATCH_ROWS = _histogram("batch_rows", "rows of requests in a step, without padding", "model", buckets=_ROWS)
STEP_SECONDS = _histogram("step_seconds", "one denoising step of a whole batch", "model")
RUN_SECONDS = _histogram("run_seconds", "a whole run of a model that cannot be stepped", "model", buckets=_LONG)
ENCODE_SECONDS = _histogram("encode_seconds", "prompts and source images of those who join a step")
DECODE_SECONDS = _histogram("decode_seconds", "latents of a few images to pixels")
PLACE_WAIT_SECONDS = _histogram("place_wait_seconds", "an image's wait for a place in a step", buckets=_LONG)
PADDING_ROWS = _counter("padding_rows", "rows added so that a step has a size that was compiled")
IMAGES = _counter("images", "images, by what became of them", "outcome", values=("succeeded", "failed", "cancelled"))
OUT_OF_MEMORY = _counter("out_of_memory", "passes that the device had too little memory for, and that were split")
ENGINE_SECONDS = _counter(
    "engine_seconds",
    "the engine's time by phase; all but idle is the device's",
    "phase",
    values=("encode", "step", "decode", "idle"),
)
INFLIGHT_REQUESTS = _gauge("inflight_requests", "images in the engine, waiting for a place or in a step")
DEVICE_MEMORY_BYTES = _gauge(
    "device_memory_bytes",
    "the device's memory; on a CPU, main memory: all of it, what is used by anyone, what this process has",
    "kind",
    values=("total", "used", "allocated"),
)

# ---- a worker: its jobs

FETCH_SECONDS = _histogram("fetch_seconds", "a job's input images from storage")
PREPARE_SECONDS = _histogram("prepare_seconds", "checks, sampler tables and starting noise of a job")
ENCODE_IMAGE_SECONDS = _histogram("encode_image_seconds", "an image to a file, with its provenance")
UPLOAD_SECONDS = _histogram("upload_seconds", "an image's files to storage")
COMMIT_SECONDS = _histogram("commit_seconds", "the script that makes a job's images visible")
RUNNING_JOBS = _gauge("running_jobs", "jobs this worker holds a lease on")
ATTEMPTS = _counter(
    "attempts",
    "attempts at jobs that have ended, by how",
    "outcome",
    values=("succeeded", "failed", "retried", "returned", "lost"),
)
LEASE_RENEWALS = _counter("lease_renewals", "leases of running jobs that were renewed")
LOST_CLAIMS = _counter("lost_claims", "claims that were somebody else's, or cancelled, when they were looked at")
FENCED_COMMITS = _counter("fenced_commits", "commits that were refused: another attempt is newer")
LEASE_REAPS = _counter(
    "lease_reaps",
    "jobs whose worker said no more, by what this worker's reaper did with them",
    "outcome",
    values=("requeued", "failed"),
)
GAP_REPUBLISH = _counter("gap_republish", "lost messages that this worker's reaper sent anew")
SPOOL_BYTES = _gauge("spool_bytes", "finished images on disk that wait for the storage")
SPOOL_LIMIT_BYTES = _gauge("spool_limit_bytes", "how many may")
STORAGE_AWAY = _gauge("storage_away", "1 while the storage does not take images")
WORKER_DRAINING = _gauge("worker_draining", "1 once this worker takes no more jobs")

# ---- a gateway or dispatcher: the fleet, as Redis has it

REDIS_UP = _gauge("redis_up", "1 if Redis has answered; if 0, nothing else is said of the fleet")
QUEUE_DEPTH = _gauge("queue_depth", "jobs in line", "lane", "model")
OLDEST_JOB_AGE_SECONDS = _gauge(
    "oldest_job_age_seconds", "how long the oldest job near the front of a line has waited", "lane", "model"
)
BACKLOG_JOBS = _gauge("backlog_jobs", "jobs in line or running: what workers should be scaled by", "model")
UNFINISHED_JOBS = _gauge("unfinished_jobs", "jobs that are not final", "state", values=("queued", "running"))
JOBS = _counter("jobs", "jobs that came to an end", "state", values=("succeeded", "failed", "cancelled"))
DEAD_JOBS = _gauge("dead_jobs", "jobs that failed for good and that nobody has looked into")
WORKERS = _gauge("workers", "live workers that could take a model's jobs", "model")
OPEN_BATCHES = _gauge("open_batches", "batches that are not final")
WEBHOOKS_WAITING = _gauge("webhooks_waiting", "deliveries that are due or will be tried again")

# ---- a gateway or dispatcher: itself

HTTP_REQUESTS = _counter("http_requests", "requests, by the route's template", "route", "method", "status")
HTTP_REQUEST_SECONDS = _histogram(
    "http_request_seconds", "until the answer's last byte", "route", "method", buckets=_SHORT
)
WEBHOOKS = _counter(
    "webhooks", "attempts to deliver a webhook, by outcome", "outcome", values=("delivered", "postponed", "dropped")
)

WORKER: tuple[Metric, ...] = (
    WORKER_INFO, BATCH_ROWS, STEP_SECONDS, RUN_SECONDS, ENCODE_SECONDS, DECODE_SECONDS, PLACE_WAIT_SECONDS,
    PADDING_ROWS, IMAGES, OUT_OF_MEMORY, ENGINE_SECONDS, INFLIGHT_REQUESTS, DEVICE_MEMORY_BYTES,
    FETCH_SECONDS, PREPARE_SECONDS, ENCODE_IMAGE_SECONDS, UPLOAD_SECONDS, COMMIT_SECONDS, RUNNING_JOBS, ATTEMPTS,
    LEASE_RENEWALS, LOST_CLAIMS, FENCED_COMMITS, LEASE_REAPS, GAP_REPUBLISH, SPOOL_BYTES, SPOOL_LIMIT_BYTES,
    STORAGE_AWAY, WORKER_DRAINING,
)  # fmt: skip
FLEET: tuple[Metric, ...] = (
    REDIS_UP, QUEUE_DEPTH, OLDEST_JOB_AGE_SECONDS, BACKLOG_JOBS, UNFINISHED_JOBS, JOBS, DEAD_JOBS, WORKERS,
    OPEN_BATCHES, WEBHOOKS_WAITING,
)  # fmt: skip
GATEWAY: tuple[Metric, ...] = (HTTP_REQUESTS, HTTP_REQUEST_SECONDS, WEBHOOKS)
