"""The life of a job: its states, the one table of legal transitions, and its record.

The record in Redis is the source of truth; a Celery message only wakes up a worker.
"""

from __future__ import annotations

import base64
import secrets
import time
from typing import Any

from pydantic import BaseModel, ConfigDict

from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.resolve import ResolvedConfig

# Every legal transition and its cause. The Lua scripts implement exactly these; a test compares them.
TRANSITIONS: dict[tuple[JobState, JobState], str] = {
    (JobState.QUEUED, JobState.RUNNING): "claim",
    (JobState.QUEUED, JobState.CANCELLED): "cancel",
    (JobState.QUEUED, JobState.SUCCEEDED): "an equal job that it waited for succeeded",
    (JobState.QUEUED, JobState.FAILED): "an equal job that it waited for failed",
    (JobState.RUNNING, JobState.SUCCEEDED): "commit",
    (JobState.RUNNING, JobState.FAILED): "fail, or reap after the last allowed failure",
    (JobState.RUNNING, JobState.QUEUED): "release on drain, fail with a retry left, or reap of an expired lease",
    (JobState.RUNNING, JobState.CANCELLED): "cancel",
}


class JobError(BaseModel):
    """Why a job failed. `code` is stable for programs, `message` is for people."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str


class Attempt(BaseModel):
    """An attempt that ended without a commit."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    worker: str | None = None
    started_at: float  # the Redis server's clock, as all times
    ended_at: float
    how: str  # lost (its lease expired), failed, released or cancelled
    error: JobError | None = None


class ImageRef(BaseModel):
    """One finished image in storage. `seed` is the seed of this image."""

    model_config = ConfigDict(frozen=True)

    key: str
    seed: int
    width: int
    height: int
    content_type: str
    bytes: int
    sha256: str


class Preview(BaseModel):
    """A rough image of a running job's result so far."""

    model_config = ConfigDict(frozen=True)

    index: int  # of the job's images
    step: int  # network evaluations done
    attempt: int
    image: str  # a JPEG file in base64

    @property
    def data(self) -> bytes:
        """The JPEG file."""
        return base64.b64decode(self.image)


class JobRecord(BaseModel):
    """A job as Redis holds it at one moment. Times are the Redis server's clock, in seconds since the epoch."""

    model_config = ConfigDict(frozen=True)

    id: str
    schema_number: int = 1  # only workers that know this number run the job
    newer: bool = False  # than this process knows: its config has only the known fields
    state: JobState
    lane: Lane
    tenant: str = "default"  # the owner; tenants share a queue fairly
    config: ResolvedConfig
    digest: str  # of the config: equal digests mean equal images
    attempt: int = 0  # claims so far; with the claim's random token it is the fence token of a commit
    failures: int = 0  # attempts that ended in an error; releases on drain do not count
    max_failures: int = 3
    crashes: int = 0  # attempts whose worker was lost
    history: tuple[Attempt, ...] = ()  # attempts without a commit: the last twenty
    created_at: float
    queued_at: float  # last time it entered the queue
    started_at: float | None = None  # of the newest attempt
    finished_at: float | None = None
    worker: str | None = None  # the worker of the newest attempt
    step: int = 0  # network evaluations done, over all its images
    total_steps: int = 0  # 0 until a worker has planned it
    error: JobError | None = None
    images: tuple[ImageRef, ...] = ()
    timings: dict[str, float] = {}  # seconds by phase, from the winning attempt
    leader: str | None = None  # the equal job that made the images; `storage`: one that had finished before
    batch: str | None = None
    custom_id: str | None = None  # the submitter's name for it in its batch
    metadata: dict[str, Any] = {}  # the submitter's data; Calotype does not read it
    traceparent: str | None = None  # the span that submitted it (W3C Trace Context), if it was traced

    @property
    def progress(self) -> float:
        """Done share, 0 to 1."""
        if self.state is JobState.SUCCEEDED:
            return 1.0
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0


_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


_PAIRS = [first + second for first in _CROCKFORD for second in _CROCKFORD]  # half as many steps an id


def new_job_id() -> str:
    """A ULID in lower case: 26 characters that sort by creation time (48 bits of milliseconds, 80 random bits)."""
    value = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    return "".join([_PAIRS[value >> shift & 1023] for shift in range(120, -1, -10)])


def created_us(job_id: str) -> int:
    """The creation time of a job's id, in microseconds since the epoch."""
    value = 0
    for character in job_id[:10]:
        value = value << 5 | _CROCKFORD.index(character)
    return value * 1000
