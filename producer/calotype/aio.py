"""The client for asyncio: the same client, its short calls in threads and its sleeping on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from calotype.client import Client, Submission, require_success
from calotype.handle import JobHandle
from calotype.picture import PictureSource
from calotype_shared.jobs import JobRecord, JobState, Lane, Preview

if TYPE_CHECKING:
    from calotype.picture import Picture
    from calotype_shared.model_card import ModelCard
    from calotype_shared.worker_info import WorkerInfo


class AsyncClient:
    """`Client` with `await`. Takes the same arguments; each call means and raises what `Client`'s does."""

    def __init__(self, redis_url: str | None = None, **options: Any) -> None:
        self._client = Client(redis_url, **options)

    async def submit(
        self,
        config: Submission,
        *,
        lane: Lane = Lane.INTERACTIVE,
        metadata: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> AsyncJobHandle:
        job = await asyncio.to_thread(self._client.submit, config, lane=lane, metadata=metadata, **fields)
        return AsyncJobHandle(self, job)

    async def submit_many(
        self, configs: Iterable[Submission], *, lane: Lane = Lane.BULK, metadata: Mapping[str, Any] | None = None
    ) -> list[AsyncJobHandle]:
        jobs = await asyncio.to_thread(self._client.submit_many, configs, lane=lane, metadata=metadata)
        return [AsyncJobHandle(self, job) for job in jobs]

    async def status(self, job_id: str) -> JobRecord:
        return await asyncio.to_thread(self._client.status, job_id)

    async def follow(self, job_ids: Sequence[str], *, timeout: float | None = None) -> AsyncIterator[JobRecord]:
        waiting = self._client.begin_wait(job_ids, timeout=timeout)
        while True:
            for record in await asyncio.to_thread(self._client.look, waiting):
                yield record
            if waiting.done:
                return
            await asyncio.sleep(self._client.pause(waiting))  # no thread is held while nothing happens

    async def wait(
        self, job_ids: Sequence[str], timeout: float | None = None, *, check: bool = True
    ) -> list[JobRecord]:
        """Wait for all of the jobs; for one job, `AsyncJobHandle.wait`."""
        final = {}
        async for record in self.follow(job_ids, timeout=timeout):
            if record.state.final:
                final[record.id] = record
        records = [final[job_id] for job_id in job_ids]
        if check:
            for record in records:
                require_success(record)
        return records

    async def cancel(self, job_id: str) -> JobState:
        return await asyncio.to_thread(self._client.cancel, job_id)

    async def upload(self, picture: PictureSource, *, field: str = "image") -> str:
        return await asyncio.to_thread(self._client.upload, picture, field=field)

    async def previews(self, job_id: str) -> list[Preview]:
        return await asyncio.to_thread(self._client.previews, job_id)

    async def images(self, job_id: str) -> list[Picture]:
        return await asyncio.to_thread(self._client.images, job_id)

    async def urls(self, job_id: str, *, expires_seconds: int | None = None) -> list[str]:
        return await asyncio.to_thread(self._client.urls, job_id, expires_seconds=expires_seconds)

    async def jobs(self, *, state: JobState | None = None, limit: int = 50) -> list[JobRecord]:
        return await asyncio.to_thread(self._client.jobs, state=state, limit=limit)

    async def models(self) -> dict[str, ModelCard]:
        return await asyncio.to_thread(self._client.models)

    async def workers(self) -> list[WorkerInfo]:
        return await asyncio.to_thread(self._client.workers)

    async def counts(self) -> dict[JobState, int]:
        return await asyncio.to_thread(self._client.counts)

    async def close(self) -> None:
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncJobHandle:
    """`JobHandle` with `await`."""

    __slots__ = ("_client", "id")

    def __init__(self, client: AsyncClient, job: JobHandle) -> None:
        self._client = client
        self.id = job.id

    def __repr__(self) -> str:
        return f"AsyncJobHandle({self.id!r})"

    async def status(self) -> JobRecord:
        return await self._client.status(self.id)

    async def wait(self, timeout: float | None = None) -> JobRecord:
        [record] = await self._client.wait([self.id], timeout)
        return record

    async def images(self, timeout: float | None = None) -> list[Picture]:
        await self.wait(timeout)
        return await self._client.images(self.id)

    async def urls(self, timeout: float | None = None) -> list[str]:
        await self.wait(timeout)
        return await self._client.urls(self.id)

    def iter_events(self, timeout: float | None = None) -> AsyncIterator[JobRecord]:
        return self._client.follow([self.id], timeout=timeout)

    async def cancel(self) -> JobState:
        return await self._client.cancel(self.id)
