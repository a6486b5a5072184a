"""Every metric that Calotype exports: name, kind, labels and meaning. docs/observability.md has the same table.

Names follow Prometheus conventions: base units, and `_total` for counters. No label holds a tenant, a job or any text
from a user, so the number of series depends only on models and routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "calotype_"

# Seconds. A step of a small model takes milliseconds; one of a large model on a slow device, tens of seconds.
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. `values` are all possible values of its first label, if they are few and known."""

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

WORKER_INFO = _gauge("worker_info", "Always 1; the labels identify the worker.", "worker", "model", "device", "version")
BATCH_ROWS = _histogram("batch_rows", "Rows per step, without padding.", "model", buckets=_ROWS)
STEP_SECONDS = _histogram("step_seconds", "Duration of one denoising step of a batch.", "model")
RUN_SECONDS = _histogram(
    "run_seconds", "Duration of a whole run of a model that cannot be stepped.", "model", buckets=_LONG
)
ENCODE_SECONDS = _histogram(
    "encode_seconds", "Time to encode the prompts and source images of requests that join a step."
)
DECODE_SECONDS = _histogram("decode_seconds", "Time to decode a few latents to pixels.")
ADMISSION_WAIT_SECONDS = _histogram(
    "admission_wait_seconds", "Time that a request waits until it joins a step batch.", buckets=_LONG
)
PADDING_ROWS = _counter("padding_rows", "Rows added to pad steps to a compiled size.")
IMAGES = _counter("images", "Images by outcome.", "outcome", values=("succeeded", "failed", "cancelled"))
OUT_OF_MEMORY = _counter("out_of_memory", "Forward passes that ran out of device memory and were split.")
ENGINE_SECONDS = _counter(
    "engine_seconds",
    "Time of the engine by phase; all phases except idle use the device.",
    "phase",
    values=("encode", "step", "decode", "idle"),
)
MERGE_PATTERNS = _counter(
    "merge_patterns",
    "Kinds of network calls of pipeline models whose first merge was checked against separate calls, by outcome: "
    "verified, or refused, which run alone from then on.",
    "outcome",
    "model",
    "network",
    values=("verified", "refused"),
)
INFLIGHT_REQUESTS = _gauge("inflight_requests", "Requests in the engine, waiting or in a step batch.")
DEVICE_MEMORY_BYTES = _gauge(
    "device_memory_bytes",
    "Device memory, or main memory on a CPU: total, used by all processes, allocated by this process.",
    "kind",
    values=("total", "used", "allocated"),
)

# ---- a worker: its jobs

FETCH_SECONDS = _histogram("fetch_seconds", "Time to download a job's input images.")
PREPARE_SECONDS = _histogram("prepare_seconds", "Time for a job's checks, sampler tables and starting noise.")
ENCODE_IMAGE_SECONDS = _histogram("encode_image_seconds", "Time to encode an image to a file, with its provenance.")
UPLOAD_SECONDS = _histogram("upload_seconds", "Time to upload an image's files.")
COMMIT_SECONDS = _histogram("commit_seconds", "Time to commit a job.")
RUNNING_JOBS = _gauge("running_jobs", "Jobs on which this worker holds a lease.")
ATTEMPTS = _counter(
    "attempts",
    "Finished attempts by outcome.",
    "outcome",
    values=("succeeded", "failed", "retried", "returned", "lost"),
)
LEASE_RENEWALS = _counter("lease_renewals", "Renewed leases.")
LOST_CLAIMS = _counter("lost_claims", "Claims found to be lost: cancelled, or taken over by another worker.")
FENCED_COMMITS = _counter("fenced_commits", "Commits refused because a newer attempt exists.")
LEASE_REAPS = _counter(
    "lease_reaps",
    "Expired leases that this worker's reaper handled, by outcome.",
    "outcome",
    values=("requeued", "failed"),
)
GAP_REPUBLISH = _counter("gap_republish", "Lost wake-up messages that this worker's reaper replaced.")
SPOOL_BYTES = _gauge("spool_bytes", "Bytes of finished images on disk that wait for storage.")
SPOOL_LIMIT_BYTES = _gauge("spool_limit_bytes", "Maximum size of the spool.")
STORAGE_UNAVAILABLE = _gauge("storage_unavailable", "1 while storage does not accept images.")
WORKER_DRAINING = _gauge("worker_draining", "1 once this worker accepts no more jobs.")

# ---- a gateway or dispatcher: the fleet, as recorded in Redis

REDIS_UP = _gauge("redis_up", "1 if Redis is reachable; if 0, no other metric of the fleet is exported.")
QUEUE_DEPTH = _gauge("queue_depth", "Queued jobs.", "lane", "model")
OLDEST_JOB_AGE_SECONDS = _gauge(
    "oldest_job_age_seconds", "Waiting time of the oldest job near the front of the queue.", "lane", "model"
)
BACKLOG_JOBS = _gauge("backlog_jobs", "Queued and running jobs; scale workers by this.", "model")
UNFINISHED_JOBS = _gauge("unfinished_jobs", "Unfinished jobs.", "state", values=("queued", "running"))
JOBS = _counter("jobs", "Finished jobs.", "state", values=("succeeded", "failed", "cancelled"))
DEAD_JOBS = _gauge("dead_jobs", "Jobs on the list of dead jobs.")
WORKERS = _gauge("workers", "Live workers that serve a model.", "model")
OPEN_BATCHES = _gauge("open_batches", "Unfinished batches.")
WEBHOOKS_WAITING = _gauge("webhooks_waiting", "Webhook deliveries that are due or will be retried.")

# ---- a gateway or dispatcher: itself

HTTP_REQUESTS = _counter("http_requests", "HTTP requests by route template.", "route", "method", "status")
HTTP_REQUEST_SECONDS = _histogram(
    "http_request_seconds", "Time until the last byte of the response.", "route", "method", buckets=_SHORT
)
WEBHOOKS = _counter(
    "webhooks", "Webhook delivery attempts by outcome.", "outcome", values=("delivered", "postponed", "dropped")
)

WORKER: tuple[Metric, ...] = (
    WORKER_INFO, BATCH_ROWS, STEP_SECONDS, RUN_SECONDS, ENCODE_SECONDS, DECODE_SECONDS, ADMISSION_WAIT_SECONDS,
    PADDING_ROWS, IMAGES, OUT_OF_MEMORY, MERGE_PATTERNS, ENGINE_SECONDS, INFLIGHT_REQUESTS, DEVICE_MEMORY_BYTES,
    FETCH_SECONDS, PREPARE_SECONDS, ENCODE_IMAGE_SECONDS, UPLOAD_SECONDS, COMMIT_SECONDS, RUNNING_JOBS, ATTEMPTS,
    LEASE_RENEWALS, LOST_CLAIMS, FENCED_COMMITS, LEASE_REAPS, GAP_REPUBLISH, SPOOL_BYTES, SPOOL_LIMIT_BYTES,
    STORAGE_UNAVAILABLE, WORKER_DRAINING,
)  # fmt: skip
FLEET: tuple[Metric, ...] = (
    REDIS_UP, QUEUE_DEPTH, OLDEST_JOB_AGE_SECONDS, BACKLOG_JOBS, UNFINISHED_JOBS, JOBS, DEAD_JOBS, WORKERS,
    OPEN_BATCHES, WEBHOOKS_WAITING,
)  # fmt: skip
GATEWAY: tuple[Metric, ...] = (HTTP_REQUESTS, HTTP_REQUEST_SECONDS, WEBHOOKS)
