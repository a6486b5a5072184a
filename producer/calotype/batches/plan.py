"""The plan of a batch: its validated manifest, stored as jobs that are ready to be queued.

A plan is a folder in storage: `jobs-000001.jsonl`, … with one JSON array per line, and
`errors-000001.jsonl`, … with the invalid lines. One dispatcher writes it into a unique folder.
It is valid only once the batch's record names it, so an interrupted validation is simply repeated.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

from calotype.batches.lines import (
    FORMATS,
    LONGEST_LINE,
    Finished,
    LineFormat,
    dump,
    parse_line,
    problem,
    read_custom_id,
)
from calotype.batches.record import BatchRecord
from calotype.resolver import Resolver
from calotype_shared.errors import CalotypeError, InvalidRequest
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.jobs import new_job_id
from calotype_shared.schema.resolve import DRAWN_SEED_BITS
from calotype_shared.storage.multipart import Line, read_lines
from calotype_shared.storage.s3 import Storage

log = logging.getLogger(__name__)

MAX_LINES = 1_000_000
_PART = 5_000  # lines
_PART_BYTES = 8 * 2**20  # of a part in memory, here and in the dispatcher that reads it
_CONTENT = "application/jsonl"


class Planned(NamedTuple):
    """The result of validating a manifest."""

    folder: str
    total: int
    invalid: int


def batch_folder(batch_id: str) -> str:
    return f"batches/{batch_id}/"


def write_plan(storage: Storage, batch: BatchRecord, resolver: Resolver, *, keep_on: Callable[[], None]) -> Planned:
    """Validate every line of a batch's manifest. `keep_on` is called for every line and can raise to stop.

    Raises:
        InvalidRequest: the manifest as a whole cannot be used.
        StorageUnavailable: the plan is not valid; repeat it.
    """
    folder = f"{batch_folder(batch.id)}plan-{new_job_id()}/"
    reader = _Reader(batch, resolver)
    jobs, errors = bytearray(), bytearray()
    parts = total = invalid = in_part = 0

    def flush() -> None:
        nonlocal parts, in_part
        parts += 1
        in_part = 0
        for name, data in (("jobs", jobs), ("errors", errors)):
            if data:
                storage.put(f"{folder}{name}-{parts:06}.jsonl", bytes(data), _CONTENT)
                data.clear()

    for line in read_lines(storage, batch.manifest, longest=LONGEST_LINE):
        keep_on()
        if line.number == 1:
            _refuse_other_encodings(line.data, batch)
        if not line.data.strip():
            continue
        if total == MAX_LINES:
            raise InvalidRequest(
                f"has more than {MAX_LINES} lines",
                field="manifest",
                value=batch.manifest,
                remedy="split it into several batches",
            )
        total += 1
        in_part += 1
        try:
            jobs += reader.read(line)
        except InvalidRequest as error:
            invalid += 1
            errors += reader.refuse(line, error)
        except CalotypeError:
            raise
        except Exception as bug:  # a bug: one line must not prevent the whole batch from starting
            log.exception("unexpected error in a manifest line", extra={"batch_id": batch.id, "line": line.number})
            invalid += 1
            refusal = InvalidRequest(
                f"caused an internal error ({type(bug).__name__})", field="line", value=line.number, remedy="report it"
            )
            errors += reader.refuse(line, refusal)
        if in_part == _PART or len(jobs) + len(errors) > _PART_BYTES:
            flush()
    if in_part:
        flush()
    return Planned(folder, total, invalid)


def _refuse_other_encodings(data: bytes, batch: BatchRecord) -> None:
    """Raises InvalidRequest for UTF-16 and UTF-32, by the mark at the start or the zero bytes that ASCII has there."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise InvalidRequest(
            "is UTF-16 or UTF-32, not UTF-8", field="manifest", value=batch.manifest, remedy="save it as UTF-8"
        )


class _Reader:
    """Turns lines of one manifest into lines of its plan. Keeps hashes of the custom ids, to find duplicates."""

    def __init__(self, batch: BatchRecord, resolver: Resolver) -> None:
        self._batch = batch
        self._resolver = resolver
        self._format: LineFormat = FORMATS[batch.format]
        self._seen: set[int] = set()

    def read(self, line: Line) -> bytes:
        """Raises InvalidRequest."""
        request = self._format.read(parse_line(line.data), number=line.number)
        seen = int.from_bytes(hashlib.blake2b(request.custom_id.encode(), digest_size=8).digest())
        if seen in self._seen:
            raise InvalidRequest(
                "was used by an earlier line", field="custom_id", value=request.custom_id, remedy="use a unique one"
            )
        batch = self._batch

        def draw_seed() -> int:
            """The seed, derived from batch and line number, so that repeated validation gives the same image."""
            drawn = hashlib.sha256(f"{batch.id}/{line.number}".encode()).digest()
            return int.from_bytes(drawn[: DRAWN_SEED_BITS // 8])

        job = self._resolver.new_job(
            request.config,
            lane=batch.lane,
            tenant=batch.tenant,
            job_id=f"{batch.id}-{line.number}",
            draw_seed=draw_seed,
        )
        self._seen.add(seen)
        return dump_job(job._replace(custom_id=request.custom_id))

    def refuse(self, line: Line, error: InvalidRequest) -> bytes:
        """The line of the error file for an invalid line."""
        try:
            custom_id = read_custom_id(parse_line(line.data).get("custom_id"), line.number)
        except InvalidRequest:
            custom_id = f"line-{line.number}"
        result = unmade(self._batch, line.number, custom_id, "invalid", problem(error))
        return dump(self._format.write(result, url=str))


def unmade(batch: BatchRecord, line: int, custom_id: str, state: str, error: dict[str, str]) -> Finished:
    """A result for a line that never became a job."""
    message = f"line {line}: {error['message']}"
    job_id = f"{batch.id}-{line}"
    return Finished(line, custom_id, job_id, state, [], {**error, "message": message}, batch.now)


def dump_job(job: NewJob) -> bytes:
    return json.dumps(job, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class PlanReader:
    """The jobs of a plan from a cursor on: `part:line`, both from 0. Holds one part in memory."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage = storage
        self._parts = [key for key in storage.list(folder) if "/jobs-" in key]
        self._held = -1
        self._lines: list[bytes] = []

    def take(self, cursor: str, most: int) -> tuple[list[NewJob], str]:
        """Up to `most` jobs of one part, and the cursor behind them. No jobs at the end of the plan."""
        part, line = map(int, cursor.split(":"))
        if part == len(self._parts):
            return [], cursor
        if part != self._held:
            self._lines = self._storage.get(self._parts[part]).splitlines()
            self._held = part
        jobs = [NewJob._make(json.loads(data)) for data in self._lines[line : line + most]]
        line += len(jobs)
        return jobs, f"{part + 1}:0" if line == len(self._lines) else f"{part}:{line}"

    def rest(self, cursor: str) -> Iterator[NewJob]:
        """Every job from the cursor on."""
        jobs, cursor = self.take(cursor, _PART)
        while jobs:
            yield from jobs
            jobs, cursor = self.take(cursor, _PART)
