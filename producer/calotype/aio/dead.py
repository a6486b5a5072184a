"""`AsyncDeadJobs`: as `DeadJobs`, with `await`."""

from __future__ import annotations

import asyncio

from calotype.aio.jobs import AsyncJobHandle, AsyncJobs
from calotype.aio.threads import Threaded, in_thread
from calotype.dead import DeadJobs
from calotype.handle import JobRef
from calotype.jobs import Jobs


class AsyncDeadJobs(Threaded[DeadJobs]):
    """`AsyncClient.dead_jobs`. A dead job stays on the list until it is retried or dropped, or its record expires."""

    def __init__(self, sync: DeadJobs, *, jobs: AsyncJobs[Jobs]) -> None:
        super().__init__(sync)
        self._jobs = jobs

    async def retry(self, job: JobRef) -> AsyncJobHandle:
        """Submit a dead job's config again as a new job, and remove the old one from the list; its record stays.

        For details and errors see `DeadJobs.retry`.
        """
        return AsyncJobHandle(self._jobs, (await asyncio.to_thread(self._sync.retry, job)).id)

    drop = in_thread(DeadJobs.drop)
    list = in_thread(DeadJobs.list)
