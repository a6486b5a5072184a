"""A batch as Redis holds it: many jobs from one manifest, with one status."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from calotype_shared.errors import UnreadableRecord
from calotype_shared.queue.records import SCHEMA, in_short
from calotype_shared.schema.enums import JobState, Lane


class BatchState(StrEnum):
    """The states of OpenAI's Batch API."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"  # no line was valid
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the batch has ended."""
        return self in (BatchState.COMPLETED, BatchState.FAILED, BatchState.EXPIRED, BatchState.CANCELLED)


class BatchFormat(StrEnum):
    """The format of the lines of its manifest and results."""

    NATIVE = "native"
    OPENAI = "openai"


class BatchCounts(BaseModel):
    """Lines by state. `waiting` lines have not been queued yet."""

    model_config = ConfigDict(frozen=True)

    total: int = 0  # 0 until the manifest has been validated
    invalid: int = 0
    waiting: int = 0
    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0

    @property
    def done(self) -> int:
        """Lines that have a result or an error."""
        return self.invalid + self.succeeded + self.failed + self.cancelled + self.expired


_TIMES = tuple(f"{state.value}_at" for state in BatchState if state is not BatchState.VALIDATING)
_PLAIN = (
    *("state", "tenant", "lane", "format", "manifest", "plan", "cursor", "fence", "window"),
    *("output", "errors", "retry_of", "input_file", "problem", "ending", "webhook", "expires_after"),
)


class BatchRecord(BaseModel):
    """A batch at one moment. Times are the Redis server's clock, in seconds since the epoch."""

    model_config = ConfigDict(frozen=True)

    id: str
    state: BatchState
    tenant: str
    lane: Lane
    format: BatchFormat
    counts: BatchCounts
    now: float  # when it was looked at
    created_at: float
    expires_at: float | None = None
    expires_after: float | None = None  # seconds, as it was asked for
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    cancelling_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelled_at: float | None = None
    paused: bool = False
    rate: float = 0.0  # jobs per second over the last ten to twenty seconds
    manifest: str  # storage key
    plan: str = ""  # the folder of its validated lines
    cursor: str = "0:0"  # part of the plan, and line in it, to dispatch next
    fence: int = 0
    window: int
    output: str | None = None  # storage keys, once final
    errors: str | None = None
    retry_of: str | None = None
    input_file: str | None = None
    problem: str | None = None  # why it failed
    ending: BatchState = BatchState.COMPLETED  # the state after finalizing
    metadata: dict[str, Any] = {}
    webhook: str | None = None

    @property
    def progress(self) -> float:
        """Share of finished lines, 0 to 1."""
        return self.counts.done / self.counts.total if self.counts.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the rate; None while the rate is unknown."""
        if self.state.final:
            return 0.0
        left = self.counts.total - self.counts.done
        return left / self.rate if self.rate > 0 and self.counts.total else None

    @classmethod
    def read(cls, batch_id: str, fields: Mapping[str, str], *, now: float) -> Self:
        """From its hash in Redis, at the server's time `now`. Raises UnreadableRecord."""
        try:
            return cls._read(batch_id, fields, now=now)
        except (KeyError, ValueError) as error:
            schema = fields.get("schema", "?")
            raise UnreadableRecord(
                f"batch {batch_id}: its record, of schema {schema!r}, cannot be read ({in_short(error)}); this "
                f"version reads up to schema {SCHEMA}: upgrade this process, or delete the record if it is damaged"
            ) from error

    @classmethod
    def _read(cls, batch_id: str, fields: Mapping[str, str], *, now: float) -> Self:
        numbers = {name: int(fields.get(name, 0)) for name in ("total", "invalid", "skipped")}
        by_state = {state.value: int(fields.get(state.value, 0)) for state in JobState}
        if "skipped_as" in fields:  # lines that never became jobs, because the batch was cancelled or expired
            by_state[fields["skipped_as"]] = by_state.get(fields["skipped_as"], 0) + numbers["skipped"]
        counted = BatchCounts(total=numbers["total"], invalid=numbers["invalid"], **by_state)
        entered = counted.done + counted.queued + counted.running
        times = {name: int(fields[name]) / 1e6 for name in ("created_at", "expires_at", *_TIMES) if name in fields}
        return cls(
            id=batch_id,
            now=now,
            counts=counted.model_copy(update={"waiting": max(0, counted.total - entered)}),
            rate=_rate(fields, counted.succeeded + counted.failed + counted.cancelled, now),
            paused="paused" in fields,
            metadata=json.loads(fields.get("metadata", "{}")),
            **times,
            **{name: fields[name] for name in _PLAIN if fields.get(name)},
        )


def _rate(fields: Mapping[str, str], done: int, now: float) -> float:
    """Jobs a second since the older of the two marks that `batch_harvest.lua` sets."""
    if "in_progress_at" not in fields:
        return 0.0
    since = int(fields.get("before_at", fields["in_progress_at"])) / 1e6
    return max(0, done - int(fields.get("before_done", 0))) / max(now - since, 0.001)
