"""The `data` part of a webhook's body, for a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calotype_shared.errors import JobNotFound
from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.storage.s3 import Storage

# (type such as job.succeeded, id) -> the payload, as JSON values; None if there is nothing to report any more.
Describe = Callable[[str, str], dict[str, Any] | None]


def describe_job(store: JobStore, storage: Storage) -> Describe:
    """Describes jobs at the moment of sending, so that the links to their images are fresh."""

    def describe(_type: str, job_id: str) -> dict[str, Any] | None:
        try:
            return job_data(store.get(job_id), storage)
        except JobNotFound:  # its record has expired
            return None

    return describe


def job_data(record: JobRecord, storage: Storage) -> dict[str, Any]:
    """The job's outcome, with a link to each image that works without keys for a while."""
    return {
        "id": record.id,
        "state": record.state.value,
        "metadata": record.metadata,
        "error": record.error.model_dump() if record.error else None,
        "images": [
            {"key": ref.key, "seed": ref.seed, "sha256": ref.sha256, "url": storage.presigned_url(ref.key)}
            for ref in record.images
        ],
    }
