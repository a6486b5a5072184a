"""`AsyncClient`: `Client` for asyncio."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, Unpack

from calotype.aio.batches import AsyncBatches, AsyncBatchHandle
from calotype.aio.dead import AsyncDeadJobs
from calotype.aio.jobs import AsyncJobHandle, AsyncJobs
from calotype.aio.threads import in_thread
from calotype.client import Client
from calotype.fields import JobFields
from calotype.resolver import Submission
from calotype_shared.observability.tracing import Telemetry
from calotype_shared.schema.enums import Lane
from calotype_shared.settings import Settings

log = logging.getLogger("calotype.client")


class AsyncClient(AsyncJobs[Client]):
    """`Client` with `await`. Has the same methods, which take the same arguments; each means and raises the same.

    Waiting holds no thread; every other call runs in one. `sleep` is called there, and is not awaited.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        settings: Settings | None = None,
        on_warning: Callable[[str], None] = log.warning,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        telemetry: Telemetry | None = None,
    ) -> None:
        sync = Client(
            redis_url, settings=settings, on_warning=on_warning, clock=clock, sleep=sleep, telemetry=telemetry
        )
        super().__init__(sync)
        self.settings = sync.settings
        self.batches = AsyncBatches(sync.batches)
        self.dead_jobs = AsyncDeadJobs(sync.dead_jobs, jobs=self)

    def batch(self, batch_id: str) -> AsyncBatchHandle:
        """A handle of the batch, without a round trip: a missing batch raises an error at the first use."""
        return AsyncBatchHandle(self.batches, batch_id)

    async def submit(
        self,
        config: Submission,
        *,
        lane: Lane = Lane.INTERACTIVE,
        metadata: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        webhook_url: str | None = None,
        **fields: Unpack[JobFields],
    ) -> AsyncJobHandle:
        """Queue one job. For parameters and errors see `Client.submit`."""
        submit = functools.partial(
            self._sync.submit,
            config,
            lane=lane,
            metadata=metadata,
            tenant=tenant,
            idempotency_key=idempotency_key,
            webhook_url=webhook_url,
            **fields,
        )
        return AsyncJobHandle(self, (await asyncio.to_thread(submit)).id)

    async def submit_many(
        self,
        configs: Iterable[Submission],
        *,
        lane: Lane = Lane.BULK,
        metadata: Mapping[str, Any] | None = None,
        tenant: str | None = None,
    ) -> list[AsyncJobHandle]:
        """Queue many jobs in few round trips. Raises as `Client.submit_many`."""
        submit = functools.partial(self._sync.submit_many, configs, lane=lane, metadata=metadata, tenant=tenant)
        return [AsyncJobHandle(self, job.id) for job in await asyncio.to_thread(submit)]

    upload = in_thread(Client.upload)
    jobs = in_thread(Client.jobs)
    models = in_thread(Client.models)
    workers = in_thread(Client.workers)
    counts = in_thread(Client.counts)
    depths = in_thread(Client.depths)
    overview = in_thread(Client.overview)
    close = in_thread(Client.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
