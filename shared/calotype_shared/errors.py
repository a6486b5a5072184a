"""Every error that Calotype raises deliberately.

CalotypeError
├── InvalidRequest          the request is invalid; nothing was queued
│   ├── UnknownModel        no worker has ever announced this model
│   └── IdempotencyConflict the idempotency key was used before for a different request
├── SettingsError           a CALOTYPE_* variable or an option is unknown or malformed
├── JobNotFound             there is no record with this id: never created, or expired
├── BatchNotFound           there is no batch with this id: never submitted, or expired
├── JobFailed               the job ended in the state `failed`; the message has the reason
├── JobCancelled            the job ended in the state `cancelled`
├── WaitTimeout             the wait timed out; the job continues
├── ModelLoadError          a model or adapter cannot be loaded; the worker does not start
├── GenerationFailed        one request failed in the engine; the others continue
├── UnreadableRecord        this version cannot read the record: a newer version wrote it, or it is damaged
├── TooBusy                 a rate or capacity limit is reached; retry after `retry_after_seconds`
│   └── QueueFull           the limit of queued jobs or open batches is reached
└── ServiceUnavailable      a service cannot be used; retry later. Nothing was lost or half-written
    ├── RedisUnavailable    Redis is unreachable or refuses requests
    └── StorageUnavailable  storage is unreachable, refuses the keys, or lacks the bucket
        └── ObjectMissing   storage answers, but the object does not exist

Every message says what is wrong, the value, and the remedy. Some errors also derive from a built-in exception:
InvalidRequest and SettingsError from ValueError; JobNotFound, BatchNotFound and ObjectMissing from LookupError;
WaitTimeout from TimeoutError; RedisUnavailable from ConnectionError. All of them are exported by `calotype`.

"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_NAME = 80  # characters of a field name, which may come from an untrusted request


class CalotypeError(Exception):
    """Base class. `code` is stable and for programs; the message is for people."""

    code = "error"


class InvalidRequest(CalotypeError, ValueError):
    """A request that cannot be fulfilled as written.

    `field` names the field or option, `value` is the given value, `problem` says what is wrong with it, and
    `remedy` says what would work.
    """

    code = "invalid_request"

    def __init__(self, problem: str, *, field: str, value: object, remedy: str) -> None:
        self.problem = problem
        if len(field) > _LONGEST_NAME:  # keep both ends: `line 2 of /a/long/path: steps`
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
    """`retry_after_seconds` says when a retry can succeed."""

    code = "too_busy"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QueueFull(TooBusy):
    """`accepted` holds the ids of the jobs of this call that were queued before the limit was reached."""

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
    """The value for use in a message, cut if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return f"({type(value).__name__} that is too large to be shown)"
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def no_such_job(job_id: str) -> JobNotFound:
    """Also for another tenant's job, so that its existence is not revealed."""
    return JobNotFound(_not_known(f"job {job_id!r}"))


def no_such_batch(batch_id: str) -> BatchNotFound:
    """Also for another tenant's batch."""
    return BatchNotFound(_not_known(f"batch {batch_id!r}"))


def _not_known(what: str) -> str:
    return (
        f"{what} does not exist: it was never submitted here, or its record has expired; check the id, and that this "
        "is the Redis it was submitted to"
    )
