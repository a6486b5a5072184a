"""`AsyncJobs` and `AsyncJobHandle`: `Jobs` and `JobHandle` with `await`. Waiting holds no thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Generic, TypeVar, overload

from calotype.aio.threads import Threaded, in_thread
from calotype.handle import AnyJobHandle, JobRef, ids_of, one_id
from calotype.job_image import JobImage
from calotype.jobs import Jobs, SeenPreviews, finals
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import JobRecord, Preview

J_co = TypeVar("J_co", bound=Jobs, covariant=True)


class AsyncJobs(Threaded[J_co], Generic[J_co]):
    """The part of `AsyncClient` for existing jobs."""

    status = in_thread(Jobs.status)
    cancel = in_thread(Jobs.cancel)
    images = in_thread(Jobs.images)
    urls = in_thread(Jobs.urls)
    previews = in_thread(Jobs.previews)

    def job(self, job_id: str) -> AsyncJobHandle:
        """A handle of the job, without a round trip: a missing job raises an error at the first use."""
        return AsyncJobHandle(self, job_id)

    def follow(self, jobs: JobRef | Iterable[JobRef], *, timeout: float | None = None) -> AsyncIterator[JobRecord]:
        """Yield each job's record now and whenever it has changed, until all are final. Raises as `Client.follow`."""
        return self._follow(ids_of(jobs, AnyJobHandle)[0], timeout)

    async def _follow(self, ids: Sequence[str], timeout: float | None) -> AsyncIterator[JobRecord]:
        waiter = self._sync.waiter
        waiting = waiter.begin(ids, timeout=timeout)
        with self._sync.job_changes.watch_async() as watch:
            while True:
                for record in await asyncio.to_thread(waiter.look, waiting):
                    yield record
                if waiting.done:
                    return
                await asyncio.to_thread(watch.set_jobs, waiting.subscribed_ids)
                await watch.wait(waiter.pause(waiting, live=watch.live), at_least=waiting.min_interval)

    @overload
    async def wait(self, jobs: JobRef, timeout: float | None = None, *, check: bool = True) -> JobRecord: ...  # type: ignore[overload-overlap]
    @overload
    async def wait(
        self, jobs: Iterable[JobRef], timeout: float | None = None, *, check: bool = True
    ) -> list[JobRecord]: ...
    async def wait(
        self, jobs: JobRef | Iterable[JobRef], timeout: float | None = None, *, check: bool = True
    ) -> JobRecord | list[JobRecord]:
        """Wait until the job, or all of the jobs, are final; returns the record or records, in order.

        Raises as `Client.wait`.
        """
        ids, one = ids_of(jobs, AnyJobHandle)
        ended = [record async for record in self._follow(ids, timeout) if record.state.final]
        records = finals(ids, ended, check=check)
        return records[0] if one else records

    def follow_previews(self, job: JobRef, *, timeout: float | None = None) -> AsyncIterator[Preview]:
        """Yield each new preview of a job's images until it is final. Raises as `Client.follow_previews`."""
        return self._follow_previews(one_id(job, AnyJobHandle), timeout)

    async def _follow_previews(self, job_id: str, timeout: float | None) -> AsyncIterator[Preview]:
        seen = SeenPreviews()
        async for _ in self._follow([job_id], timeout):
            for preview in seen.new(await self.previews(job_id)):
                yield preview


class AsyncJobHandle(AnyJobHandle[AsyncJobs[Jobs]]):
    """`JobHandle` with `await`."""

    __slots__ = ()

    async def status(self) -> JobRecord:
        """The job as it is now. Raises JobNotFound."""
        return await self._client.status(self.id)

    async def done(self) -> bool:
        """Whether the job is final, however it ended. Raises JobNotFound."""
        return (await self.status()).state.final

    async def wait(self, timeout: float | None = None, *, check: bool = True) -> JobRecord:
        """Wait until the job is final. Raises as `Client.wait`."""
        return await self._client.wait(self.id, timeout, check=check)

    async def result(self, timeout: float | None = None) -> list[JobImage]:
        """Wait until the job has succeeded, then download its images. Raises as `Client.wait` and `Client.images`."""
        await self.wait(timeout)
        return await self.images()

    def follow(self, *, timeout: float | None = None) -> AsyncIterator[JobRecord]:
        """Yield the job's record now and whenever it changes, the final one last. Raises as `Client.follow`."""
        return self._client.follow(self.id, timeout=timeout)

    async def cancel(self) -> JobState:
        """Cancel the job immediately. Raises JobNotFound."""
        return await self._client.cancel(self.id)

    async def images(self) -> list[JobImage]:
        """Download the images of the finished job. Raises as `Client.images`."""
        return await self._client.images(self.id)

    async def urls(self, *, expires_seconds: int | None = None) -> list[str]:
        """Links to the finished job's images that work without keys, for a while. Raises as `Client.images`."""
        return await self._client.urls(self.id, expires_seconds=expires_seconds)

    async def previews(self) -> list[Preview]:
        """The newest preview of each image while it runs, if it was submitted with `preview_every`."""
        return await self._client.previews(self.id)

    def follow_previews(self, *, timeout: float | None = None) -> AsyncIterator[Preview]:
        """Yield each new preview until it is final. Raises as `Client.follow`."""
        return self._client.follow_previews(self.id, timeout=timeout)
