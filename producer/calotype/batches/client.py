"""`Batches`: operations on batches by id or handle. `BatchHandle`: one batch."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Unpack, overload

from calotype.batches.manifest import Manifest, manifest_bytes, whole_lines, with_custom_id
from calotype.batches.options import BatchOptions, option_fields
from calotype.batches.plan import batch_folder
from calotype.batches.record import BatchRecord
from calotype.batches.store import BatchStore
from calotype.batches.waiting import POLL_SECONDS, BatchWaiting
from calotype.connections import Connections
from calotype.handle import AnyBatchHandle, BatchRef, ids_of, one_id
from calotype.resolver import idempotency
from calotype_shared.errors import (
    BatchNotFound,
    IdempotencyConflict,
    InvalidRequest,
    JobNotFound,
    ObjectMissing,
    QueueFull,
)
from calotype_shared.queue.submission import Idempotency
from calotype_shared.schema.jobs import new_job_id
from calotype_shared.storage.multipart import ObjectWriter, read_chunks, read_lines


class Batches:
    """`Client.batches`: many jobs from one manifest."""

    def __init__(self, connections: Connections) -> None:
        settings = connections.settings
        self._store = BatchStore(
            connections.redis,
            key_prefix=settings.key_prefix,
            retention_seconds=settings.retention_seconds,
            max_open=settings.max_open_batches,
            max_open_per_tenant=settings.max_open_batches_per_tenant,
        )
        self._jobs = connections.store
        self._storage = connections.storage
        self._resolver = connections.resolver
        self._clock = connections.clock
        self._sleep = connections.sleep

    def submit(
        self, manifest: Manifest, *, idempotency_key: str | None = None, **options: Unpack[BatchOptions]
    ) -> BatchHandle:
        """Submit many jobs as one batch: a JSONL file of up to a million lines, or an iterable of configs.

        The manifest is streamed into storage and never held whole. A dispatcher validates it, keeps `window` jobs in
        the queue until all have ended, and writes the results to storage. Invalid lines are in its
        errors, by line number; the others run.

        Raises:
            InvalidRequest: an option is invalid, or the file cannot be read; nothing was submitted.
            IdempotencyConflict: the key was used before for a different manifest.
            QueueFull: the limit of open batches is reached.
        """
        batch_id = f"batch_{new_job_id()}"
        key = f"{batch_folder(batch_id)}manifest.jsonl"
        fields = option_fields(options, self._resolver)
        digest = hashlib.sha256()
        with ObjectWriter(self._storage, key) as writer:
            for data in manifest_bytes(manifest):
                digest.update(data)
                writer.write(data)
        return self._create(batch_id, key, fields, idempotency(idempotency_key, digest.hexdigest(), fields))

    def submit_stored(
        self, key: str, *, input_file: str, idempotency_key: str | None = None, **options: Unpack[BatchOptions]
    ) -> BatchHandle:
        """Submit a manifest that is already in storage, under the name `input_file`. Raises like `submit`."""
        fields = {**option_fields(options, self._resolver), "input_file": input_file}
        return self._create(f"batch_{new_job_id()}", key, fields, idempotency(idempotency_key, key, fields))

    def _create(
        self, batch_id: str, key: str, fields: Mapping[str, str], asked: Idempotency | None = None
    ) -> BatchHandle:
        try:
            found = self._store.create(
                batch_id, tenant=fields["tenant"], fields={**fields, "manifest": key}, idempotency=asked
            )
        except (QueueFull, IdempotencyConflict):
            self._forget_manifest(batch_id, key)
            raise
        if found != batch_id:
            self._forget_manifest(batch_id, key)
        return BatchHandle(self, found)

    def _forget_manifest(self, batch_id: str, key: str) -> None:
        """Delete the manifest of a batch that was not created. One that was in storage before stays."""
        if key.startswith(batch_folder(batch_id)):
            self._storage.delete(key)

    def status(self, batch: BatchRef) -> BatchRecord:
        """The batch as it is now, in one round trip. Raises BatchNotFound."""
        return self._store.get(one_id(batch, AnyBatchHandle))

    def follow(self, batches: BatchRef | Iterable[BatchRef], *, timeout: float | None = None) -> Iterator[BatchRecord]:
        """Yield each batch's record now and a few times a second, until all are final.

        A dispatcher must run somewhere (`calotype dispatcher`).

        Raises:
            BatchNotFound: a batch has no record.
            WaitTimeout: after `timeout` seconds; the batches go on.
        """
        return self._follow(ids_of(batches, AnyBatchHandle)[0], timeout)

    def _follow(self, ids: Sequence[str], timeout: float | None) -> Iterator[BatchRecord]:
        waiting = BatchWaiting(ids, started=self._clock(), timeout=timeout)
        while True:
            for batch_id in waiting.unfinished:
                record = self._store.get(batch_id)
                yield record
                waiting.update(record, self._clock())
            if not waiting.unfinished:
                return
            self._sleep(POLL_SECONDS)

    @overload
    def wait(self, batches: BatchRef, timeout: float | None = None) -> BatchRecord: ...  # type: ignore[overload-overlap]
    @overload
    def wait(self, batches: Iterable[BatchRef], timeout: float | None = None) -> list[BatchRecord]: ...
    def wait(
        self, batches: BatchRef | Iterable[BatchRef], timeout: float | None = None
    ) -> BatchRecord | list[BatchRecord]:
        """Wait until the batch, or all of the batches, are final, however they end; returns the records, in order.

        Raises:
            BatchNotFound, WaitTimeout: as `follow`.
        """
        ids, one = ids_of(batches, AnyBatchHandle)
        final = {record.id: record for record in self._follow(ids, timeout)}
        records = [final[batch_id] for batch_id in ids]
        return records[0] if one else records

    @overload
    def cancel(self, batches: BatchRef) -> BatchRecord: ...  # type: ignore[overload-overlap]
    @overload
    def cancel(self, batches: Iterable[BatchRef]) -> list[BatchRecord]: ...
    def cancel(self, batches: BatchRef | Iterable[BatchRef]) -> BatchRecord | list[BatchRecord]:
        """Cancel batches: no new job starts, and running jobs stop within a step. Final batches stay as they are.

        Raises:
            BatchNotFound: a batch has no record. The others are still cancelled.
        """
        ids, one = ids_of(batches, AnyBatchHandle)
        records, missing = [], None
        for batch_id in ids:
            try:
                records.append(self._cancel(batch_id))
            except BatchNotFound as error:
                missing = missing or error
        if missing is not None:
            raise missing
        return records[0] if one else records

    def _cancel(self, batch_id: str) -> BatchRecord:
        self._store.cancel(batch_id)
        if not self._store.get(batch_id).state.final:
            for job_id in self._store.live(batch_id):
                with suppress(JobNotFound):  # a dispatcher has already stored its result and deleted the record
                    self._jobs.cancel(job_id)
        return self._store.get(batch_id)

    def pause(self, batch: BatchRef) -> None:
        """Pause the batch: no more of its jobs are queued. Queued jobs still run. Raises BatchNotFound."""
        self._store.pause(one_id(batch, AnyBatchHandle), paused=True)

    def resume(self, batch: BatchRef) -> None:
        """Go on with a paused batch. Raises BatchNotFound."""
        self._store.pause(one_id(batch, AnyBatchHandle), paused=False)

    def retry(self, batch: BatchRef, **options: Unpack[BatchOptions]) -> BatchHandle:
        """Submit the lines of a final batch that did not succeed as a new batch.

        `options` as for `submit`; those that are not given are as they were.

        Raises:
            InvalidRequest: the batch is not final, every line succeeded, or its input file has been deleted.
        """
        record = self.status(batch)
        if not record.state.final:
            raise InvalidRequest(
                f"is still {record.state.value}",
                field="batch",
                value=record.id,
                remedy="wait until it ends, or cancel it",
            )
        failed = self._failed_lines(record)
        if not failed:
            raise InvalidRequest(
                "has no failed lines", field="batch", value=record.id, remedy="there is nothing to retry"
            )
        new_id = f"batch_{new_job_id()}"
        key = f"{batch_folder(new_id)}manifest.jsonl"
        try:
            with ObjectWriter(self._storage, key) as writer:
                for line in read_lines(self._storage, record.manifest):
                    if line.number in failed:
                        writer.write(with_custom_id(line.data, failed[line.number]))
        except ObjectMissing:
            raise InvalidRequest(
                "its input file has been deleted", field="batch", value=record.id, remedy="submit its lines again"
            ) from None
        kept: BatchOptions = {
            "lane": record.lane,
            "tenant": record.tenant,
            "metadata": record.metadata,
            "window": record.window,
            "format": record.format,
            "webhook_url": record.webhook,
            "expires_in": record.expires_after,
        }
        fields = {**option_fields({**kept, **options}, self._resolver), "retry_of": record.id}
        return self._create(new_id, key, fields)

    def _failed_lines(self, batch: BatchRecord) -> dict[int, str]:
        """Custom ids of the lines that did not succeed, by line."""
        custom_ids = {}
        for result in self.results(batch.id, errors=True):
            job_id = str(result.get("job_id") or str(result["id"]).removeprefix("batch_req_"))
            custom_ids[int(job_id.rpartition("-")[2])] = str(result["custom_id"])
        return custom_ids

    def results(self, batch: BatchRef, *, errors: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the results so far, or the errors, one per line, in the order in which the jobs ended.

        Raises:
            BatchNotFound: at the first one.
        """
        return map(json.loads, whole_lines(self.result_chunks(batch, errors=errors)))

    def result_chunks(self, batch: BatchRef, *, errors: bool = False) -> Iterator[bytes]:
        """Yield the same as the bytes of a JSONL file, a few MiB at a time."""
        return self._result_chunks(one_id(batch, AnyBatchHandle), errors=errors)

    def _result_chunks(self, batch_id: str, *, errors: bool) -> Iterator[bytes]:
        batch = self._store.get(batch_id)
        kind = "errors" if errors else "output"
        if batch.state.final:
            keys = [key for key in (batch.errors if errors else batch.output,) if key]
        else:
            planned = self._storage.list(batch.plan) if errors and batch.plan else ()
            keys = [key for key in planned if "/errors-" in key]
            keys += [key for key in self._store.parts(batch.id) if f".{kind}." in key]
        for key in keys:
            yield from read_chunks(self._storage, key)

    def list(self, *, tenant: str | None = None, limit: int = 20, after: str | None = None) -> list[BatchRecord]:
        """A tenant's batches, newest first. `after` is the id of the last one of the page before."""
        return self._store.newest(tenant=self._resolver.tenant(tenant), limit=limit, after=after)


class BatchHandle(AnyBatchHandle[Batches]):
    """A batch's id with the client's verbs on it. Holds no state: every answer is fresh from Redis."""

    __slots__ = ()

    def status(self) -> BatchRecord:
        """The batch as it is now. Raises BatchNotFound."""
        return self._client.status(self.id)

    def done(self) -> bool:
        """Whether the batch is final, however it ended. Raises BatchNotFound."""
        return self.status().state.final

    def wait(self, timeout: float | None = None) -> BatchRecord:
        """Wait until it is final, however it ended. Raises BatchNotFound, WaitTimeout."""
        return self._client.wait(self.id, timeout)

    def result(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Wait until the batch ends; returns an iterator over the outcome of every line: successes, then errors.

        Raises:
            BatchNotFound, WaitTimeout: as `wait`.
        """
        self.wait(timeout)
        return itertools.chain(self.results(), self.errors())

    def follow(self, *, timeout: float | None = None) -> Iterator[BatchRecord]:
        """Yield the batch now and a few times a second, until it is final. Raises as `wait`."""
        return self._client.follow(self.id, timeout=timeout)

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield the results so far."""
        return self._client.results(self.id)

    def errors(self) -> Iterator[dict[str, Any]]:
        """Yield the errors so far, with line numbers."""
        return self._client.results(self.id, errors=True)

    def cancel(self) -> BatchRecord:
        """Cancel the batch: no new job starts, and running jobs stop within a step. Raises BatchNotFound."""
        return self._client.cancel(self.id)

    def pause(self) -> None:
        """Pause the batch: no more of its jobs are queued. Queued jobs still run. Raises BatchNotFound."""
        self._client.pause(self.id)

    def resume(self) -> None:
        """Go on with the paused batch. Raises BatchNotFound."""
        self._client.resume(self.id)

    def retry(self, **options: Unpack[BatchOptions]) -> BatchHandle:
        """Submit the lines that did not succeed as a new batch. Raises like `Batches.retry`."""
        return self._client.retry(self.id, **options)
