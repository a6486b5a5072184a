"""What only operators are shown: names of workers, which contain host and process, and addresses of services."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from calotype_shared.errors import CalotypeError, RedisUnavailable, ServiceUnavailable, StorageUnavailable

log = logging.getLogger(__name__)

_SERVICES: tuple[tuple[type[ServiceUnavailable], str], ...] = (
    (RedisUnavailable, "the queue"),
    (StorageUnavailable, "the storage"),
)
_LATER = "cannot be used now; retry later. The gateway's log has the reason"


def public_worker(name: str) -> str:
    """The same for the same worker, and nothing of its name."""
    return f"worker-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def public_job(shown: dict[str, Any]) -> dict[str, Any]:
    """A job as it is shown, changed in place for a caller who is no operator."""
    attempts = [shown, *(shown.get("history") or ())]
    for part in attempts:
        if part.get("worker"):
            part["worker"] = public_worker(part["worker"])
        error = part.get("error")
        for kind, what in _SERVICES:
            if error and error.get("code") == kind.code:
                error["message"] = f"{what} could not be used"
    return shown


def public_error(error: CalotypeError) -> CalotypeError:
    """The error without the address of a service; the whole of it is logged."""
    for kind, what in _SERVICES:
        if isinstance(error, kind):
            log.warning("a service cannot be used", extra={"reason": str(error)})
            return kind(f"{what} {_LATER}")
    return error
