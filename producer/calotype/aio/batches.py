"""`AsyncBatches` and `AsyncBatchHandle`: as `Batches` and `BatchHandle`, with `await`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Unpack, overload

from calotype.aio.threads import Threaded, in_thread, iterated_in_thread
from calotype.batches.client import Batches
from calotype.batches.manifest import Manifest
from calotype.batches.options import BatchOptions
from calotype.batches.record import BatchRecord
from calotype.batches.waiting import POLL_SECONDS, BatchWaiting
from calotype.handle import AnyBatchHandle, BatchRef, ids_of


class AsyncBatches(Threaded[Batches]):
    """`AsyncClient.batches`: many jobs from one manifest."""

    status = in_thread(Batches.status)
    cancel = in_thread(Batches.cancel)
    pause = in_thread(Batches.pause)
    resume = in_thread(Batches.resume)

    async def submit(
        self, manifest: Manifest, *, idempotency_key: str | None = None, **options: Unpack[BatchOptions]
    ) -> AsyncBatchHandle:
        """Submit many jobs as one batch: a JSONL file of up to a million lines, or an iterable of configs.

        For details and errors see `Batches.submit`.
        """
        submit = functools.partial(self._sync.submit, manifest, idempotency_key=idempotency_key, **options)
        return AsyncBatchHandle(self, (await asyncio.to_thread(submit)).id)

    async def submit_stored(
        self, key: str, *, input_file: str, idempotency_key: str | None = None, **options: Unpack[BatchOptions]
    ) -> AsyncBatchHandle:
        """Submit a manifest that is already in storage, under the name `input_file`. Raises like `submit`."""
        submit = functools.partial(
            self._sync.submit_stored, key, input_file=input_file, idempotency_key=idempotency_key, **options
        )
        return AsyncBatchHandle(self, (await asyncio.to_thread(submit)).id)

    def follow(
        self, batches: BatchRef | Iterable[BatchRef], *, timeout: float | None = None
    ) -> AsyncIterator[BatchRecord]:
        """Yield each batch's record now and a few times a second, until all are final. Raises as `Batches.follow`."""
        return self._follow(ids_of(batches, AnyBatchHandle)[0], timeout)

    async def _follow(self, ids: Sequence[str], timeout: float | None) -> AsyncIterator[BatchRecord]:
        clock = asyncio.get_running_loop().time
        waiting = BatchWaiting(ids, started=clock(), timeout=timeout)
        while True:
            for batch_id in waiting.unfinished:
                record = await self.status(batch_id)
                yield record
                waiting.update(record, clock())
            if not waiting.unfinished:
                return
            await asyncio.sleep(POLL_SECONDS)

    @overload
    async def wait(self, batches: BatchRef, timeout: float | None = None) -> BatchRecord: ...  # type: ignore[overload-overlap]
    @overload
    async def wait(self, batches: Iterable[BatchRef], timeout: float | None = None) -> list[BatchRecord]: ...
    async def wait(
        self, batches: BatchRef | Iterable[BatchRef], timeout: float | None = None
    ) -> BatchRecord | list[BatchRecord]:
        """Wait until the batch, or all of the batches, are final, however they end; returns the records, in order.

        Raises as `Batches.wait`.
        """
        ids, one = ids_of(batches, AnyBatchHandle)
        final = {record.id: record async for record in self._follow(ids, timeout)}
        records = [final[batch_id] for batch_id in ids]
        return records[0] if one else records

    async def retry(self, batch: BatchRef, **options: Unpack[BatchOptions]) -> AsyncBatchHandle:
        """Submit the lines of a final batch that did not succeed as a new batch. `options` as for `submit`.

        Raises as `Batches.retry`.
        """
        retry = functools.partial(self._sync.retry, batch, **options)
        return AsyncBatchHandle(self, (await asyncio.to_thread(retry)).id)

    def results(self, batch: BatchRef, *, errors: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Yield the results so far, or the errors, one per line, in the order in which the jobs ended.

        Raises as `Batches.results`.
        """
        return iterated_in_thread(self._sync.results(batch, errors=errors))

    def result_chunks(self, batch: BatchRef, *, errors: bool = False) -> AsyncIterator[bytes]:
        """Yield the same as the bytes of a JSONL file, a few MiB at a time."""
        return iterated_in_thread(self._sync.result_chunks(batch, errors=errors), at_once=1)

    list = in_thread(Batches.list)


class AsyncBatchHandle(AnyBatchHandle[AsyncBatches]):
    """`BatchHandle` with `await`."""

    __slots__ = ()

    async def status(self) -> BatchRecord:
        """The batch as it is now. Raises BatchNotFound."""
        return await self._client.status(self.id)

    async def done(self) -> bool:
        """Whether the batch is final, however it ended. Raises BatchNotFound."""
        return (await self.status()).state.final

    async def wait(self, timeout: float | None = None) -> BatchRecord:
        """Wait until it is final, however it ended. Raises BatchNotFound, WaitTimeout."""
        return await self._client.wait(self.id, timeout)

    async def result(self, timeout: float | None = None) -> AsyncIterator[dict[str, Any]]:
        """Wait until the batch ends; returns an iterator over the outcome of every line: successes, then errors.

        Raises as `BatchHandle.result`.
        """
        await self.wait(timeout)
        return self._every_line()

    async def _every_line(self) -> AsyncIterator[dict[str, Any]]:
        for lines in (self.results(), self.errors()):
            async for line in lines:
                yield line

    def follow(self, *, timeout: float | None = None) -> AsyncIterator[BatchRecord]:
        """Yield the batch now and a few times a second, until it is final. Raises as `wait`."""
        return self._client.follow(self.id, timeout=timeout)

    def results(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the results so far."""
        return self._client.results(self.id)

    def errors(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the errors so far, with line numbers."""
        return self._client.results(self.id, errors=True)

    async def cancel(self) -> BatchRecord:
        """Cancel the batch: no new job starts, and running jobs stop within a step. Raises BatchNotFound."""
        return await self._client.cancel(self.id)

    async def pause(self) -> None:
        """Pause the batch: no more of its jobs are queued. Queued jobs still run. Raises BatchNotFound."""
        await self._client.pause(self.id)

    async def resume(self) -> None:
        """Go on with the paused batch. Raises BatchNotFound."""
        await self._client.resume(self.id)

    async def retry(self, **options: Unpack[BatchOptions]) -> AsyncBatchHandle:
        """Submit the lines that did not succeed as a new batch. Raises like `Batches.retry`."""
        return await self._client.retry(self.id, **options)
