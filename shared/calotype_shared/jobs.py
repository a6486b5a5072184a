"""The life of a job: its states, the one table of legal transitions, and its record.

The record in Redis is the truth; a Celery message only says "look at this record".
"""

from __future__ import annotations

import base64
import secrets
import time
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from calotype_shared.config import GenerationConfig


class Lane(StrEnum):
    """A queue's urgency. Workers always look at `interactive` first."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return not any(edge[0] is self for edge in TRANSITIONS)


# Every legal edge and what takes it. The Lua scripts implement exactly these; a test compares them.
TRANSITIONS: dict[tuple[JobState, JobState], str] = {
    (JobState.QUEUED, JobState.RUNNING): "claim",
    (JobState.QUEUED, JobState.CANCELLED): "cancel",
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


class ImageRef(BaseModel):
    """One finished picture in storage. `seed` is the one this very picture was made with."""

    model_config = ConfigDict(frozen=True)

    key: str
    seed: int
    width: int
    height: int
    content_type: str
    bytes: int
    sha256: str


class Preview(BaseModel):
    """A rough picture of what a running job is heading to."""

    model_config = ConfigDict(frozen=True)

    index: int  # of the job's pictures
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
    state: JobState
    lane: Lane
    config: GenerationConfig
    digest: str  # of the config: equal digests mean equal pictures
    attempt: int = 0  # claims so far; the newest is the fence token that a commit must carry
    failures: int = 0  # attempts that ended in a crash or an error; releases on drain do not count
    max_failures: int = 3
    created_at: float
    queued_at: float  # last time it entered the queue
    started_at: float | None = None  # of the newest attempt
    finished_at: float | None = None
    worker: str | None = None  # who holds or held the newest attempt
    step: int = 0  # network evaluations done, over all its pictures
    total_steps: int = 0  # 0 until a worker has planned it
    error: JobError | None = None
    images: tuple[ImageRef, ...] = ()
    timings: dict[str, float] = {}  # seconds by phase, from the winning attempt
    metadata: dict[str, Any] = {}  # the submitter's own words; never read by Calotype

    @property
    def progress(self) -> float:
        """Done share, 0 to 1."""
        if self.state is JobState.SUCCEEDED:
            return 1.0
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0


_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


def new_job_id() -> str:
    """A ULID in lower case: 26 characters that sort by creation time (48 bits of milliseconds, 80 random bits)."""
    value = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))
