"""Every error Calotype raises on purpose.

CalotypeError
├── InvalidRequest          the caller's fault, said before anything is queued
│   └── UnknownModel        no worker has ever announced that model
├── SettingsError           a CALOTYPE_* variable or option is unknown or malformed
├── JobNotFound             no record under that id: never created, or expired
├── JobFailed               the job ended in `failed`; carries its JobError
├── JobCancelled            the job ended in `cancelled`
├── WaitTimeout             a wait ended before the job did; the job goes on
├── ModelLoadError          a model folder or hub id cannot be used (fatal for a worker)
├── GenerationFailed        one request failed inside the engine; its neighbours go on
└── ServiceUnavailable      worth a retry: nothing was lost, nothing half-written
    ├── RedisUnavailable
    └── StorageUnavailable  S3 is away, refuses the keys, or has no such bucket

Every message says what was wrong, the value, and what to do about it.
"""

from __future__ import annotations


class CalotypeError(Exception):
    """The root. `code` is a stable word for programs; the message is for people."""

    code = "error"


class InvalidRequest(CalotypeError):
    """A request that cannot be honoured as written.

    `field` names the offending field or option, `value` is what was given, `problem` what is wrong with it and
    `remedy` what would work.
    """

    code = "invalid_request"

    def __init__(self, problem: str, *, field: str, value: object, remedy: str) -> None:
        self.problem = problem
        self.field = field
        self.value = value
        self.remedy = remedy
        super().__init__(f"{field}={_shown(value)}: {problem}; {remedy}")


class UnknownModel(InvalidRequest):
    code = "unknown_model"


class SettingsError(CalotypeError):
    code = "invalid_setting"


class JobNotFound(CalotypeError):
    code = "job_not_found"


class JobFailed(CalotypeError):
    code = "job_failed"


class JobCancelled(CalotypeError):
    code = "job_cancelled"


class WaitTimeout(CalotypeError):
    code = "wait_timeout"


class ModelLoadError(CalotypeError):
    code = "model_load_error"


class GenerationFailed(CalotypeError):
    code = "generation_failed"


class ServiceUnavailable(CalotypeError):
    code = "service_unavailable"


class RedisUnavailable(ServiceUnavailable):
    code = "redis_unavailable"


class StorageUnavailable(ServiceUnavailable):
    code = "storage_unavailable"


def _shown(value: object, limit: int = 80) -> str:
    """The value as it goes into a message: a long prompt is cut, not repeated whole."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
