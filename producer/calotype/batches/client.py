"""`BatchCalls`: what `Client` can do with batches; and `BatchHandle`, one batch as its submitter holds it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, Unpack

from calotype.batches.lines import dump
from calotype.batches.plan import batch_folder
from calotype.batches.record import BatchFormat, BatchRecord
from calotype.batches.store import BatchStore
from calotype.resolver import Resolver, Submission, idempotency, storable
from calotype_shared.errors import IdempotencyConflict, InvalidRequest, JobNotFound, QueueFull, WaitTimeout
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.submission import Idempotency
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.jobs import new_job_id
from calotype_shared.settings import Settings
from calotype_shared.storage.multipart import ObjectWriter, read_chunks, read_lines
from calotype_shared.storage.s3 import Storage

WINDOW = 2_000  # jobs of a batch in Redis at a time
POLL_SECONDS = 0.25
_READ_BYTES = 2**20

Manifest = Path | Iterable[Submission]  # a JSONL file, or configs, prompts and mappings of fields


class BatchOptions(TypedDict, total=False):
    """What may be said of a batch as a whole."""

    lane: Lane  # bulk
    tenant: str | None
    metadata: Mapping[str, Any] | None
    webhook_url: str | None
    expires_in: float | None  # seconds after which what is not done is given up
    window: int  # jobs of it in Redis at a time
    format: BatchFormat  # native


class BatchCalls:
    """The part of `Client` that is about batches."""

    settings: Settings
    _store: JobStore
    _storage: Storage
    _resolver: Resolver
    _batches: BatchStore
    _clock: Callable[[], float]
    _sleep: Callable[[float], None]

    def submit_batch(
        self, manifest: Manifest, *, idempotency_key: str | None = None, **options: Unpack[BatchOptions]
    ) -> BatchHandle:
        """Submit many jobs as one batch: a JSONL file of up to a million lines, or an iterable of configs.

        The manifest is streamed into storage and never held whole. A dispatcher validates it, keeps `window` jobs in
        the queue until all are done, and writes the results into storage. Lines that cannot be used are in its
        errors, by line number; the rest runs.

        Raises:
            InvalidRequest: an option is wrong, or the file cannot be read; nothing was submitted.
            IdempotencyConflict: the key was used before, for another manifest.
            QueueFull: as many batches are open as may be.
        """
        batch_id = f"batch_{new_job_id()}"
        key = f"{batch_folder(batch_id)}manifest.jsonl"
        fields = self._batch_fields(options)
        digest = hashlib.sha256()
        with ObjectWriter(self._storage, key) as writer:
            for data in _manifest_bytes(manifest):
                digest.update(data)
                writer.write(data)
        return self._create_batch(batch_id, key, fields, idempotency(idempotency_key, digest.hexdigest(), fields))

    def submit_batch_file(
        self, key: str, *, input_file: str, idempotency_key: str | None = None, **options: Unpack[BatchOptions]
    ) -> BatchHandle:
        """The same for a manifest that is in storage already, under the name `input_file`."""
        fields = {**self._batch_fields(options), "input_file": input_file}
        return self._create_batch(f"batch_{new_job_id()}", key, fields, idempotency(idempotency_key, key, fields))

    def _batch_fields(self, options: BatchOptions) -> dict[str, str]:
        """The options as the batch's record holds them. Raises InvalidRequest."""
        window, expires_in = options.get("window", WINDOW), options.get("expires_in")
        for field, value, low, high in (("window", window, 1, 100_000), ("expires_in", expires_in, 1, 365 * 86_400)):
            if value is not None and not low <= value <= high:
                raise InvalidRequest("is out of range", field=field, value=value, remedy=f"use {low} to {high}")
        fields = {
            "lane": options.get("lane", Lane.BULK).value,
            "tenant": self._resolver.tenant(options.get("tenant")),
            "format": options.get("format", BatchFormat.NATIVE).value,
            "window": str(window),
            "metadata": json.dumps(storable(options.get("metadata"))),
            "webhook": self._resolver.webhook(options.get("webhook_url")),
            "expires_after": None if expires_in is None else str(math.ceil(expires_in)),
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _create_batch(
        self, batch_id: str, key: str, fields: Mapping[str, str], asked: Idempotency | None = None
    ) -> BatchHandle:
        try:
            found = self._batches.create(
                batch_id, tenant=fields["tenant"], fields={**fields, "manifest": key}, idempotency=asked
            )
        except (QueueFull, IdempotencyConflict):
            self._forget_manifest(batch_id, key)
            raise
        if found != batch_id:
            self._forget_manifest(batch_id, key)
        return BatchHandle(self, found)

    def _forget_manifest(self, batch_id: str, key: str) -> None:
        """Of a batch that there is not. One that was in storage before stays."""
        if key.startswith(batch_folder(batch_id)):
            self._storage.delete(key)

    def batch(self, batch_id: str) -> BatchRecord:
        """The batch as it is now, in one round trip. Raises BatchNotFound."""
        return self._batches.get(batch_id)

    def batches(self, *, tenant: str | None = None, limit: int = 20, after: str | None = None) -> list[BatchRecord]:
        """A tenant's batches, newest first. `after` is the last one of the page before."""
        return self._batches.newest(tenant=self._resolver.tenant(tenant), limit=limit, after=after)

    def cancel_batch(self, batch_id: str) -> BatchRecord:
        """Nothing new of it starts, and its running jobs stop within a step. A final batch stays as it is."""
        self._batches.cancel(batch_id)
        if not self.batch(batch_id).state.final:
            for job_id in self._batches.live(batch_id):
                with suppress(JobNotFound):  # a dispatcher was faster: it is final, written down and gone
                    self._store.cancel(job_id)
        return self.batch(batch_id)

    def pause_batch(self, batch_id: str) -> None:
        """Send no more of its jobs into the queue; those that are there already run."""
        self._batches.pause(batch_id, paused=True)

    def resume_batch(self, batch_id: str) -> None:
        self._batches.pause(batch_id, paused=False)

    def retry_batch(self, batch_id: str, **options: Unpack[BatchOptions]) -> BatchHandle:
        """A new batch of only those lines of a final one that did not succeed. `options` as for `submit_batch`.

        Raises:
            InvalidRequest: it is not final yet, or every line succeeded.
        """
        batch = self.batch(batch_id)
        if not batch.state.final:
            raise InvalidRequest(
                f"is still {batch.state.value}", field="batch", value=batch_id, remedy="wait for it, or cancel it first"
            )
        failed = self._failed_lines(batch)
        if not failed:
            raise InvalidRequest(
                "has no failed lines", field="batch", value=batch_id, remedy="there is nothing to retry"
            )
        new_id = f"batch_{new_job_id()}"
        key = f"{batch_folder(new_id)}manifest.jsonl"
        with ObjectWriter(self._storage, key) as writer:
            for line in read_lines(self._storage, batch.manifest):
                if line.number in failed:
                    writer.write(_with_custom_id(line.data, failed[line.number]))
        kept: BatchOptions = {
            "lane": batch.lane,
            "tenant": batch.tenant,
            "metadata": batch.metadata,
            "window": batch.window,
            "format": batch.format,
        }
        fields = {**self._batch_fields({**kept, **options}), "retry_of": batch_id}
        return self._create_batch(new_id, key, fields)

    def _failed_lines(self, batch: BatchRecord) -> dict[int, str]:
        """Custom ids of the lines that did not succeed, by line."""
        custom_ids = {}
        for result in self.batch_results(batch.id, errors=True):
            job_id = str(result.get("job_id") or str(result["id"]).removeprefix("batch_req_"))
            custom_ids[int(job_id.rpartition("-")[2])] = str(result["custom_id"])
        return custom_ids

    def batch_results(self, batch_id: str, *, errors: bool = False) -> Iterator[dict[str, Any]]:
        """The results so far, or the errors, one a line; in the order in which the jobs ended."""
        for data in _lines(self.batch_result_chunks(batch_id, errors=errors)):
            yield json.loads(data)

    def batch_result_chunks(self, batch_id: str, *, errors: bool = False) -> Iterator[bytes]:
        """The same as the bytes of a JSONL file, a few MiB at a time."""
        batch = self.batch(batch_id)
        kind = "errors" if errors else "output"
        if batch.state.final:
            keys = [key for key in (batch.errors if errors else batch.output,) if key]
        else:
            planned = self._storage.list(batch.plan) if errors and batch.plan else ()
            keys = [key for key in planned if "/errors-" in key]
            keys += [key for key in self._batches.parts(batch.id) if f".{kind}." in key]
        for key in keys:
            yield from read_chunks(self._storage, key)

    def wait_batch(self, batch_id: str, timeout: float | None = None) -> BatchRecord:
        """Wait until it is final. A dispatcher must run somewhere (`calotype dispatcher`). Raises WaitTimeout."""
        for record in self.follow_batch(batch_id, timeout=timeout):
            last = record
        return last

    def follow_batch(self, batch_id: str, *, timeout: float | None = None) -> Iterator[BatchRecord]:
        """The batch now and a few times a second, until it is final. Raises WaitTimeout."""
        started = self._clock()
        while True:
            record = self.batch(batch_id)
            yield record
            if record.state.final:
                return
            if timeout is not None and self._clock() - started >= timeout:
                raise WaitTimeout(still_running(record, timeout))
            self._sleep(POLL_SECONDS)


def still_running(record: BatchRecord, timeout: float | None) -> str:
    """What to say when a wait ends before its batch."""
    return (
        f"batch {record.id} is still {record.state.value} after {timeout:g} s "
        f"({record.counts.done} of {record.counts.total} lines done); wait longer, or cancel it; "
        "if nothing moves, start a dispatcher: calotype dispatcher"
    )


class BatchHandle:
    """A batch's id with the client's verbs on it. Holds no state."""

    __slots__ = ("_client", "id")

    def __init__(self, client: BatchCalls, batch_id: str) -> None:
        self._client = client
        self.id = batch_id

    def __repr__(self) -> str:
        return f"BatchHandle({self.id!r})"

    def status(self) -> BatchRecord:
        return self._client.batch(self.id)

    def wait(self, timeout: float | None = None) -> BatchRecord:
        """Wait until it is final, however it ended. Raises WaitTimeout."""
        return self._client.wait_batch(self.id, timeout)

    def results(self) -> Iterator[dict[str, Any]]:
        """What succeeded so far."""
        return self._client.batch_results(self.id)

    def errors(self) -> Iterator[dict[str, Any]]:
        """What failed so far, with line numbers."""
        return self._client.batch_results(self.id, errors=True)

    def cancel(self) -> BatchRecord:
        return self._client.cancel_batch(self.id)

    def pause(self) -> None:
        self._client.pause_batch(self.id)

    def resume(self) -> None:
        self._client.resume_batch(self.id)

    def retry(self, **options: Unpack[BatchOptions]) -> BatchHandle:
        """A new batch of only the lines that did not succeed."""
        return self._client.retry_batch(self.id, **options)


def _manifest_bytes(manifest: Manifest) -> Iterator[bytes]:
    if isinstance(manifest, (str, bytes)):
        raise InvalidRequest(
            "is no manifest", field="manifest", value=manifest, remedy="give a pathlib.Path or an iterable of configs"
        )
    if isinstance(manifest, Path):
        with manifest.open("rb") as file:
            while data := file.read(_READ_BYTES):
                yield data
        return
    for config in manifest:
        if isinstance(config, GenerationConfig):
            yield config.canonical_json().encode() + b"\n"
        else:
            yield dump({"prompt": config} if isinstance(config, str) else config)


def _with_custom_id(data: bytes, custom_id: str) -> bytes:
    """The line as it was, by the name it had: a line without a name had that of its number."""
    try:
        fields = json.loads(data)
        if isinstance(fields, dict):
            return dump({**fields, "custom_id": custom_id})
    except ValueError:
        pass
    return data + b"\n"


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest
