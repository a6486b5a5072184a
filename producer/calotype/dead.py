"""`DeadJobs`: lists, retries and drops jobs that failed permanently."""

from __future__ import annotations

from collections.abc import Callable

from calotype.connections import Connections
from calotype.handle import AnyJobHandle, JobRef, one_id
from calotype.jobs import JobHandle
from calotype_shared.errors import InvalidRequest, JobNotFound
from calotype_shared.schema.jobs import JobRecord


class DeadJobs:
    """`Client.dead_jobs`. A dead job stays on the list until it is retried or dropped, or its record expires."""

    def __init__(self, connections: Connections, *, submit: Callable[..., JobHandle]) -> None:
        self._redis = connections.redis
        self._store = connections.store
        self._submit = submit

    def retry(self, job: JobRef) -> JobHandle:
        """Submit a dead job's config again as a new job, and remove the old one from the list; its record stays.

        If the call is repeated, it returns the same new job.

        Raises:
            JobNotFound: the job is not on the list.
            InvalidRequest: its config can no longer be done, or its webhook no longer be reached; it stays on the list.
        """
        job_id = one_id(job, AnyJobHandle)
        record = self._dead(job_id)
        if record.newer:
            raise InvalidRequest(
                f"was written by a newer version (schema {record.schema_number}) and cannot be fully read here",
                field="job_id",
                value=job_id,
                remedy="upgrade this process",
            )
        webhook = self._redis.hget(self._store.keys.job(job_id), "webhook")
        handle = self._submit(
            record.config,
            lane=record.lane,
            metadata=record.metadata,
            tenant=record.tenant,
            idempotency_key=f"dead-{job_id}",
            webhook_url=None if webhook is None else str(webhook),
        )
        self._store.forget_dead(job_id)
        return handle

    def drop(self, job: JobRef) -> None:
        """Remove a dead job from the list; its record stays until it expires. Raises JobNotFound."""
        job_id = one_id(job, AnyJobHandle)
        if not self._store.forget_dead(job_id):
            raise JobNotFound(_not_there(job_id))

    def _dead(self, job_id: str) -> JobRecord:
        if not self._store.is_dead(job_id):
            raise JobNotFound(_not_there(job_id))
        return self._store.get(job_id)

    def list(self, *, limit: int = 50, tenant: str | None = None) -> list[JobRecord]:
        """Dead jobs, newest first; `history` has each attempt.

        Failed lines of a batch are in its errors instead; only those on which workers died are listed here.
        """
        return self._store.dead(limit=limit, tenant=tenant)


def _not_there(job_id: str) -> str:
    return (
        f"job {job_id!r} is not on the list of dead jobs: it did not fail for good, or was retried or dropped; "
        "see: calotype dead list"
    )
