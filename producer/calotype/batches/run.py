"""`BatchRun`: runs one batch from start to end, in the dispatcher that leads it.

        ┌──────── late ───────────────┐
    validating ──► in_progress ──► finalizing ──► completed, expired
        │               │
        └───────────────┴────────► cancelling ──► cancelled

Every write is refused if another dispatcher has taken the lead. All state needed to continue is in Redis and
storage: the plan, the cursor, the jobs whose results are not stored yet, the parts of the results. So a dispatcher can
die at any point, and two can believe for a while that they lead.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

from calotype.batches.lines import FORMATS, Finished, dump
from calotype.batches.plan import PlanReader, batch_folder, unmade, write_plan
from calotype.batches.record import BatchRecord, BatchState
from calotype.batches.store import BatchStore, LeadLost
from calotype.resolver import Resolver
from calotype_shared.errors import InvalidRequest, JobNotFound, StorageUnavailable
from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.jobs import new_job_id
from calotype_shared.storage.multipart import ObjectWriter, read_chunks
from calotype_shared.storage.s3 import Storage

LEASE_SECONDS = 20.0
_CHUNK = 200  # jobs a script call
_LEAST = 64  # queued jobs of a batch, however long the queue is: the basis of its tenant's fair share
_HARVEST = 1_000  # results a part
_FLUSH_SECONDS = (2.0, 60.0)  # results are readable after this time, however few; longer with more parts
_PAUSE_SECONDS = 0.15
_KEEP_SECONDS = 1.0  # between two looks at the batch while its manifest is validated
_CONTENT = "application/jsonl"
_MEANINGS = {
    BatchState.CANCELLED: ("batch_cancelled", "the batch was cancelled before this line was done"),
    BatchState.EXPIRED: ("batch_expired", "the batch expired before this line was done"),
}


class _Paused(Exception):
    """Raised if the batch is paused, to free its slot for another batch."""


class BatchRun:
    """Used by one thread."""

    def __init__(
        self,
        batch_id: str,
        *,
        who: str,
        batches: BatchStore,
        jobs: JobStore,
        storage: Storage,
        resolver: Resolver,
        stop: threading.Event,
    ) -> None:
        self._id = batch_id
        self._who = who
        self._batches = batches
        self._jobs = jobs
        self._storage = storage
        self._resolver = resolver
        self._stop = stop
        self._plan: PlanReader | None = None
        self._queues: set[str] = set()
        self._harvested = time.monotonic()
        self._parts = 0  # written by this run

    def run(self) -> None:
        """Lead the batch until it is final or paused, another dispatcher leads it, or this process stops."""
        while not self._stop.is_set():
            batch = self._lead()
            if batch is None:
                return
            try:
                self._advance(batch)
            except LeadLost:
                continue  # its state or leader has changed: the next turn reads it
            except _Paused:
                break
        self._batches.resign(self._id, who=self._who)

    def _lead(self) -> BatchRecord | None:
        return self._batches.lead(self._id, who=self._who, lease_seconds=LEASE_SECONDS)

    def _advance(self, batch: BatchRecord) -> None:
        """One turn. Raises LeadLost."""
        if batch.state in (BatchState.VALIDATING, BatchState.IN_PROGRESS) and _is_late(batch):
            self._batches.move(batch, BatchState.FINALIZING, {"ending": BatchState.EXPIRED.value})
        elif batch.state is BatchState.VALIDATING:
            self._validate(batch)
        elif batch.state is BatchState.IN_PROGRESS:
            if not self._turn(batch):
                self._stop.wait(_PAUSE_SECONDS)
        elif batch.state is BatchState.CANCELLING:
            self._close(batch, BatchState.CANCELLED)
        else:
            self._close(batch, batch.ending)

    # ---- validating

    def _validate(self, batch: BatchRecord) -> None:
        looked = time.monotonic()

        def keep_on() -> None:
            nonlocal looked
            if self._stop.is_set():
                raise LeadLost(batch.id)
            if time.monotonic() - looked < _KEEP_SECONDS:
                return
            looked = time.monotonic()
            now = self._lead()
            if now is None or now.state is not BatchState.VALIDATING or _is_late(now):
                raise LeadLost(batch.id)

        try:
            if not self._storage.exists(batch.manifest):
                raise InvalidRequest(
                    "is missing in storage", field="manifest", value=batch.manifest, remedy="submit the batch again"
                )
            planned = write_plan(self._storage, batch, self._resolver, keep_on=keep_on)
        except InvalidRequest as error:
            self._batches.move(batch, BatchState.FAILED, {"problem": str(error)})
            return
        counted = {"plan": planned.folder, "total": str(planned.total), "invalid": str(planned.invalid)}
        if planned.invalid < planned.total:
            self._batches.move(batch, BatchState.IN_PROGRESS, counted)
            return
        problem = "no line of the manifest can be used" if planned.total else "the manifest is empty"
        errors = self._write(f"{batch_folder(batch.id)}errors.jsonl", self._plan_errors(planned.folder))
        self._batches.move(batch, BatchState.FAILED, {**counted, "problem": problem, "errors": errors})

    # ---- in progress

    def _turn(self, batch: BatchRecord) -> bool:
        """Queue jobs up to the window and store results. Returns whether anything changed."""
        if self._plan is None:
            self._plan = PlanReader(self._storage, batch.plan)
        live, done, waiting = self._batches.in_flight(batch.id, self._queues)
        harvested = self._harvest(batch, done, draining=live == 0)
        room = batch.window - live - done + harvested
        if waiting > batch.window:
            room = min(room, _LEAST - live)
        if batch.paused and live + done == 0:
            raise _Paused
        sent, ended = (0, False) if batch.paused else self._dispatch(batch, self._plan, room)
        if ended and not sent and live + done == 0:
            self._batches.move(batch, BatchState.FINALIZING)
            return True
        return bool(sent or harvested)

    def _dispatch(self, batch: BatchRecord, plan: PlanReader, room: int) -> tuple[int, bool]:
        """The number of jobs queued, and whether none are left."""
        cursor, sent = batch.cursor, 0
        while True:
            jobs, behind = plan.take(cursor, max(1, min(_CHUNK, room - sent)))
            if not jobs or sent >= room:
                return sent, not jobs
            self._batches.dispatch(batch, jobs, start=cursor, end=behind)
            self._queues.update(job.queue for job in jobs)
            cursor, sent = behind, sent + len(jobs)

    def _harvest(self, batch: BatchRecord, done: int, *, draining: bool) -> int:
        """Store results as parts, then delete the jobs' records. Returns their number."""
        soon, at_last = _FLUSH_SECONDS
        late = time.monotonic() - self._harvested >= min(at_last, soon * (1 + self._parts / 50))
        if not done or not (draining or late or done >= _HARVEST):
            return 0
        output, errors = bytearray(), bytearray()
        found = self._batches.finished(batch.id, _HARVEST)
        for job_id, fields in found:
            result = _result(batch, job_id, fields)
            (output if result.good else errors).extend(self._line(batch, result))
        parts = []
        for kind, data in (("output", output), ("errors", errors)):
            if data:
                parts.append(f"{batch_folder(batch.id)}parts/{new_job_id()}.{kind}.jsonl")
                self._storage.put(parts[-1], bytes(data), _CONTENT)
        self._parts += len(parts)
        self._batches.harvested(batch, parts=parts, job_ids=[job_id for job_id, _ in found])
        self._harvested = time.monotonic()
        return len(found)

    def _line(self, batch: BatchRecord, result: Finished) -> bytes:
        return dump(FORMATS[batch.format].write(result, url=self._storage.longest_url))

    # ---- closing

    def _close(self, batch: BatchRecord, ending: BatchState) -> None:
        """Cancel running jobs, store all results, join the parts, and set the final state."""
        for job_id in self._batches.live(batch.id):
            try:
                self._jobs.cancel(job_id)
            except JobNotFound:
                continue
        while done := self._batches.in_flight(batch.id, ())[1]:
            self._harvest(batch, done, draining=True)
            if self._lead() is None:
                raise LeadLost(batch.id)
        folder = batch_folder(batch.id)
        parts = self._batches.parts(batch.id)
        output = self._write(f"{folder}output.jsonl", self._joined(key for key in parts if ".output." in key))
        skipped = _Counted(self._skipped(batch, ending))
        errors = self._write(f"{folder}errors.jsonl", self._all_errors(batch, parts, skipped))
        files = {name: key for name, key in (("output", output), ("errors", errors)) if key}
        left = {"skipped": str(skipped.count), "skipped_as": ending.value} if skipped.count else {}
        self._batches.move(batch, ending, {**files, **left})
        self._tidy(parts, batch.plan)

    def _all_errors(self, batch: BatchRecord, parts: list[str], skipped: Iterator[bytes]) -> Iterator[bytes]:
        yield from self._plan_errors(batch.plan)
        yield from self._joined(key for key in parts if ".errors." in key)
        yield from skipped

    def _plan_errors(self, folder: str) -> Iterator[bytes]:
        return self._joined(key for key in self._storage.list(folder) if "/errors-" in key) if folder else iter(())

    def _skipped(self, batch: BatchRecord, ending: BatchState) -> Iterator[bytes]:
        """The lines that never became jobs."""
        if not batch.plan or ending is BatchState.COMPLETED:
            return
        code, message = _MEANINGS[ending]
        for job in PlanReader(self._storage, batch.plan).rest(batch.cursor):
            line = int(job.id.rpartition("-")[2])
            result = unmade(batch, line, job.custom_id, ending.value, {"code": code, "message": message})
            yield self._line(batch, result)

    def _joined(self, keys: Iterator[str]) -> Iterator[bytes]:
        for key in keys:
            yield from read_chunks(self._storage, key)

    def _write(self, key: str, data: Iterator[bytes]) -> str:
        """The key; empty if there is no data and so no object."""
        first = next(data, b"")
        if not first:
            return ""
        with ObjectWriter(self._storage, key) as writer:
            writer.write(first)
            renewed = time.monotonic()
            for piece in data:
                writer.write(piece)
                if time.monotonic() - renewed > LEASE_SECONDS / 4:
                    renewed = time.monotonic()
                    if self._lead() is None:
                        raise LeadLost(self._id)
        return key

    def _tidy(self, parts: list[str], plan: str) -> None:
        """Delete the parts that the joined files contain. Best effort: nothing refers to them any more."""
        keys = [*parts, *(self._storage.list(plan) if plan else ())]
        try:
            for start in range(0, len(keys), 1000):
                self._storage.delete_many(keys[start : start + 1000])
        except StorageUnavailable:
            return


def _is_late(batch: BatchRecord) -> bool:
    return batch.expires_at is not None and batch.now >= batch.expires_at


class _Counted(Iterator[bytes]):
    """Counts the items."""

    def __init__(self, items: Iterator[bytes]) -> None:
        self._items = items
        self.count = 0

    def __next__(self) -> bytes:
        item = next(self._items)
        self.count += 1
        return item


def _result(batch: BatchRecord, job_id: str, fields: dict[str, str]) -> Finished:
    """The result of a final job."""
    line = int(job_id.rpartition("-")[2])
    if "state" not in fields:  # Redis has lost the record
        lost = {"code": "record_lost", "message": "the job's record is gone; retry the line"}
        return Finished(line, f"line-{line}", job_id, "failed", [], lost, batch.now)
    error = json.loads(fields["error"]) if "error" in fields and fields["state"] == "failed" else None
    if fields["state"] == "cancelled":
        ending = BatchState.CANCELLED if batch.state is BatchState.CANCELLING else batch.ending
        code, message = _MEANINGS.get(ending, ("job_cancelled", "the job was cancelled"))
        error = {"code": code, "message": message}
    return Finished(
        line=line,
        custom_id=fields.get("custom_id", ""),
        job_id=job_id,
        state=fields["state"],
        images=json.loads(fields.get("images", "[]")),
        error=error,
        finished_at=int(fields["finished_at"]) / 1e6,
    )
