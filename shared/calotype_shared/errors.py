"""Every error Calotype raises on purpose.

CalotypeError
├── InvalidRequest          the caller's fault, said before anything is queued
│   ├── UnknownModel        no worker has ever announced that model
│   └── IdempotencyConflict an idempotency key was used before, for another request
├── SettingsError           a CALOTYPE_* variable or option is unknown or malformed
├── JobNotFound             no record under that id: never created, or expired
├── BatchNotFound           no batch under that id: never submitted, or its record has expired
├── JobFailed               the job ended in `failed`; the message has the reason
├── JobCancelled            the job ended in `cancelled`
├── WaitTimeout             a wait ended before the job did; the job goes on
├── ModelLoadError          a model folder or hub id cannot be used (fatal for a worker)
├── GenerationFailed        one request failed inside the engine; its neighbours go on
├── UnreadableRecord        a record that this version cannot read: written by a newer one, or damaged
├── TooBusy                 nothing is wrong, there is only too much; says when to come again
│   └── QueueFull           as many jobs or batches wait as may
└── ServiceUnavailable      worth a retry: nothing was lost, nothing half-written
    ├── RedisUnavailable
    └── StorageUnavailable  S3 is away, refuses the keys, or has no such bucket
        └── ObjectMissing   it answers, and has no such object

Every message says what was wrong, the value, and what to do about it. Some are a built-in exception too, and are
caught as that: InvalidRequest and SettingsError as ValueError; JobNotFound, BatchNotFound and ObjectMissing as
LookupError; WaitTimeout as TimeoutError; RedisUnavailable as ConnectionError. All of them are exported by `calotype`.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_NAME = 80  # of a field: whoever asks may have made it up


class CalotypeError(Exception):
    """The root. `code` is a stable word for programs; the message is for people."""

    code = "error"


class InvalidRequest(CalotypeError, ValueError):
    """A request that cannot be honoured as written.

    `field` names the offending field or option, `value` is what was given, `problem` what is wrong with it and
    `remedy` what would work.
    """

    code = "invalid_request"

    def __init__(self, problem: str, *, field: str, value: object, remedy: str) -> None:
        self.problem = problem
        if len(field) > _LONGEST_NAME:  # the end says more than the middle: `line 2 of /a/long/path: steps`
            field = f"{field[: _LONGEST_NAME // 2]}…{field[-_LONGEST_NAME // 2 :]}"
        self.field = field
        self.value = value
        self.remedy = remedy
        super().__init__(f"{field}={shown(value)}: {problem}; {remedy}")


class UnknownModel(InvalidRequest):
    code = "unknown_model"


class IdempotencyConflict(InvalidRequest):
    code = "idempotency_conflict"


class SettingsError(CalotypeError, ValueError):
    code = "invalid_setting"


class JobNotFound(CalotypeError, LookupError):
    code = "job_not_found"


class BatchNotFound(CalotypeError, LookupError):
    code = "batch_not_found"


class JobFailed(CalotypeError):
    code = "job_failed"


class JobCancelled(CalotypeError):
    code = "job_cancelled"


class WaitTimeout(CalotypeError, TimeoutError):
    code = "wait_timeout"


class ModelLoadError(CalotypeError):
    code = "model_load_error"


class GenerationFailed(CalotypeError):
    code = "generation_failed"


class UnreadableRecord(CalotypeError):
    code = "unreadable_record"


class TooBusy(CalotypeError):
    """`retry_after_seconds` is when it may work again."""

    code = "too_busy"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QueueFull(TooBusy):
    """`accepted` are the ids of those jobs of one call that were queued before the queue was full."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_seconds: float, *, accepted: Sequence[str] = ()) -> None:
        super().__init__(message, retry_after_seconds)
        self.accepted = list(accepted)


class ServiceUnavailable(CalotypeError):
    code = "service_unavailable"


class RedisUnavailable(ServiceUnavailable, ConnectionError):
    code = "redis_unavailable"


class StorageUnavailable(ServiceUnavailable):
    code = "storage_unavailable"


class ObjectMissing(StorageUnavailable, LookupError):
    code = "object_missing"


def shown(value: object, limit: int = 80) -> str:
    """The value as it goes into a message: a long prompt is cut, not repeated whole."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return f"({type(value).__name__} that is too large to be written)"
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def no_such_job(job_id: str) -> JobNotFound:
    """Also for one of another tenant: nobody is told that there is one."""
    return JobNotFound(_not_known(f"job {job_id!r}"))


def no_such_batch(batch_id: str) -> BatchNotFound:
    """As `no_such_job`."""
    return BatchNotFound(_not_known(f"batch {batch_id!r}"))


def _not_known(what: str) -> str:
    return (
        f"{what} is not known: it was never submitted here, or its record has expired; check the id, and that this is "
        "the queue it was submitted to"
    )
