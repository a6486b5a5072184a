"""Exit statuses of the command. `calotype --help` and the documentation print this table."""

from __future__ import annotations

from enum import IntEnum

from calotype.gc.bucket_identity import GcRefused
from calotype_shared.errors import (
    BatchNotFound,
    CalotypeError,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobNotFound,
    ModelLoadError,
    ServiceUnavailable,
    SettingsError,
    TooBusy,
    WaitTimeout,
)


class ExitCode(IntEnum):
    OK = 0
    JOB_FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    TIMEOUT = 5
    MODEL = 6
    INTERRUPTED = 130


MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "success",
    ExitCode.JOB_FAILED: "a job failed or was cancelled, or another error occurred",
    ExitCode.USAGE: "an option, a setting or a request is invalid; nothing was queued",
    ExitCode.NOT_FOUND: "the job or batch does not exist",
    ExitCode.UNAVAILABLE: "Redis, storage, a worker or a package is missing, or the queue is full; can be retried",
    ExitCode.TIMEOUT: "the wait timed out; the job continues",
    ExitCode.MODEL: "a worker cannot load its model",
    ExitCode.INTERRUPTED: "interrupted",
}

_BY_ERROR: dict[type[CalotypeError], ExitCode] = {
    JobFailed: ExitCode.JOB_FAILED,
    JobCancelled: ExitCode.JOB_FAILED,
    InvalidRequest: ExitCode.USAGE,
    SettingsError: ExitCode.USAGE,
    GcRefused: ExitCode.USAGE,
    JobNotFound: ExitCode.NOT_FOUND,
    BatchNotFound: ExitCode.NOT_FOUND,
    ServiceUnavailable: ExitCode.UNAVAILABLE,
    TooBusy: ExitCode.UNAVAILABLE,
    ModelLoadError: ExitCode.MODEL,
    WaitTimeout: ExitCode.TIMEOUT,
}


def exit_code(error: CalotypeError) -> ExitCode:
    """The status of an error's nearest ancestor in the table."""
    for ancestor in type(error).__mro__:
        if ancestor in _BY_ERROR:
            return _BY_ERROR[ancestor]
    return ExitCode.JOB_FAILED


def exit_code_help() -> str:
    return "Exit status: " + "; ".join(f"{code.value} {meaning}" for code, meaning in MEANINGS.items()) + "."
