"""The client for asyncio: the same client, its short calls in threads and its sleeping on the event loop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

from calotype.batches.client import POLL_SECONDS, BatchOptions, Manifest, still_running
from calotype.batches.record import BatchRecord
from calotype.client import Client, require_success
from calotype.handle import JobHandle
from calotype.job_image import ImageSource
from calotype.resolver import Submission
from calotype_shared.errors import WaitTimeout
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord, Preview

if TYPE_CHECKING:
    from calotype.job_image import JobImage
    from calotype_shared.schema.model_card import ModelCard
    from calotype_shared.schema.worker_info import WorkerInfo


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
        tenant: str | None = None,
        idempotency_key: str | None = None,
        webhook_url: str | None = None,
        **fields: Any,
    ) -> AsyncJobHandle:
        job = await asyncio.to_thread(
            self._client.submit,
            config,
            lane=lane,
            metadata=metadata,
            tenant=tenant,
            idempotency_key=idempotency_key,
            webhook_url=webhook_url,
            **fields,
        )
        return AsyncJobHandle(self, job)

    async def submit_many(
        self,
        configs: Iterable[Submission],
        *,
        lane: Lane = Lane.BULK,
        metadata: Mapping[str, Any] | None = None,
        tenant: str | None = None,
    ) -> list[AsyncJobHandle]:
        jobs = await asyncio.to_thread(self._client.submit_many, configs, lane=lane, metadata=metadata, tenant=tenant)
        return [AsyncJobHandle(self, job) for job in jobs]

    async def status(self, job_id: str) -> JobRecord:
        return await asyncio.to_thread(self._client.status, job_id)

    async def follow(self, job_ids: Sequence[str], *, timeout: float | None = None) -> AsyncIterator[JobRecord]:
        waiting = self._client.begin_wait(job_ids, timeout=timeout)
        with self._client.job_changes.watch_async() as watch:
            while True:
                for record in await asyncio.to_thread(self._client.look, waiting):
                    yield record
                if waiting.done:
                    return
                await asyncio.to_thread(watch.set_jobs, waiting.subscribed_ids)
                # No thread is held while nothing happens.
                await watch.wait(self._client.pause(waiting, live=watch.live), at_least=waiting.min_interval)

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

    async def submit_batch(
        self, manifest: Manifest, *, idempotency_key: str | None = None, **options: Unpack[BatchOptions]
    ) -> str:
        """The batch's id."""
        submit = functools.partial(self._client.submit_batch, manifest, idempotency_key=idempotency_key, **options)
        return (await asyncio.to_thread(submit)).id

    async def batch(self, batch_id: str) -> BatchRecord:
        return await asyncio.to_thread(self._client.batch, batch_id)

    async def wait_batch(self, batch_id: str, timeout: float | None = None) -> BatchRecord:
        loop = asyncio.get_running_loop()
        ends = None if timeout is None else loop.time() + timeout
        while not (record := await self.batch(batch_id)).state.final:
            if ends is not None and loop.time() >= ends:
                raise WaitTimeout(still_running(record, timeout))
            await asyncio.sleep(POLL_SECONDS)
        return record

    async def cancel_batch(self, batch_id: str) -> BatchRecord:
        return await asyncio.to_thread(self._client.cancel_batch, batch_id)

    async def upload(self, image: ImageSource, *, field: str = "image") -> str:
        return await asyncio.to_thread(self._client.upload, image, field=field)

    async def previews(self, job_id: str) -> list[Preview]:
        return await asyncio.to_thread(self._client.previews, job_id)

    async def images(self, job_id: str) -> list[JobImage]:
        return await asyncio.to_thread(self._client.images, job_id)

    async def urls(self, job_id: str, *, expires_seconds: int | None = None) -> list[str]:
        return await asyncio.to_thread(self._client.urls, job_id, expires_seconds=expires_seconds)

    async def jobs(
        self, *, state: JobState | None = None, limit: int = 50, tenant: str | None = None, after: str | None = None
    ) -> list[JobRecord]:
        return await asyncio.to_thread(self._client.jobs, state=state, limit=limit, tenant=tenant, after=after)

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

    async def images(self, timeout: float | None = None) -> list[JobImage]:
        await self.wait(timeout)
        return await self._client.images(self.id)

    async def urls(self, timeout: float | None = None) -> list[str]:
        await self.wait(timeout)
        return await self._client.urls(self.id)

    def iter_events(self, timeout: float | None = None) -> AsyncIterator[JobRecord]:
        return self._client.follow([self.id], timeout=timeout)

    async def cancel(self) -> JobState:
        return await self._client.cancel(self.id)
