"""`Overview`: a snapshot of the queues, the workers and the rows of their step batches, for operators."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.schema.worker_info import StepGroup, StepRow, WorkerInfo

_LONGEST_PROMPT = 120  # characters: enough to recognize a job


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class QueueLine(_Part):
    """Jobs that wait for the same models, in one lane."""

    name: str
    models: tuple[str, ...]
    lane: Lane
    waiting: int
    oldest_wait_seconds: float | None = None  # None: no job waits


class WorkerView(_Part):
    """A live worker. Counters are since its start."""

    name: str
    models: tuple[str, ...]
    device: str
    version: str
    started_at: float
    draining: bool
    running_jobs: int
    forward_passes: int
    rows: int
    images: int
    failed: int
    out_of_memory: int
    step_seconds: float
    idle_seconds: float
    groups: tuple[StepGroup, ...]


class Overview(_Part):
    """A snapshot taken at `at`, in seconds since the epoch."""

    at: float
    queues: tuple[QueueLine, ...]
    jobs_a_second: float | None = Field(description="That ended lately; null where no worker has measured it.")
    workers: tuple[WorkerView, ...]
    counts: dict[JobState, int] | None = Field(
        None, description="Jobs by state over all tenants; only for who may administer."
    )


def look(store: JobStore, *, tenant: str | None = None) -> Overview:
    """The current snapshot. With `tenant`, only its jobs are identified. Raises RedisUnavailable."""
    workers = store.workers()
    ids = list({row.job for worker in workers for group in worker.groups for row in group.rows if row.job})
    records = {record.id: record for record in store.get_many(ids) if record is not None} if ids else {}
    known = {job_id: record for job_id, record in records.items() if tenant in (None, record.tenant)}
    waits = store.oldest_waits()
    return Overview(
        at=time.time(),
        queues=tuple(_line(name, waiting, waits.get(name)) for name, waiting in store.depths().items()),
        jobs_a_second=store.completion_rate(),
        workers=tuple(_worker(worker, known) for worker in workers),
        counts=store.counts(),
    )


def _line(name: str, waiting: int, oldest: float | None) -> QueueLine:
    models, _, lane = name.rpartition(".")
    return QueueLine(
        name=name, models=tuple(models.split("+")), lane=Lane(lane), waiting=waiting, oldest_wait_seconds=oldest
    )


def _worker(worker: WorkerInfo, known: Mapping[str, JobRecord]) -> WorkerView:
    shared = worker.model_dump(include=set(WorkerView.model_fields) - {"models", "groups"})
    return WorkerView(**shared, models=worker.models, groups=tuple(_group(group, known) for group in worker.groups))


def _group(group: StepGroup, known: Mapping[str, JobRecord]) -> StepGroup:
    return group.model_copy(update={"rows": tuple(_row(row, known.get(row.job or "")) for row in group.rows)})


def _row(row: StepRow, record: JobRecord | None) -> StepRow:
    """With the job's prompt, or without anything that identifies the job if the caller may not see its record."""
    if record is None:
        return row.model_copy(update={"job": None, "image": None, "prompt": None})
    return row.model_copy(update={"prompt": record.config.prompt[:_LONGEST_PROMPT]})
