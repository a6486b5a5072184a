"""`Collector`: lists the bucket once, page by page, and removes what nothing refers to any more.

It never removes what is younger than the safe age when it starts: that may be an upload in progress, whose record is
not written yet. Everything else is looked up when it is listed. Safe to run beside all other parts and
other collectors.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from redis import Redis

from calotype.batches.record import BatchState
from calotype.gc.bucket_identity import IDENTITY_KEY, BucketIdentity, GcRefused
from calotype.gc.references import References
from calotype.gc.report import Kind, Report
from calotype_shared.queue.scripts import Scripted, said_clearly
from calotype_shared.schema.enums import JobState
from calotype_shared.storage.s3 import SAFE_SECONDS, Storage, StoredObject

_DAY = 86_400.0  # a multipart upload older than this is considered abandoned
# A state that this version does not know is not final, so nothing is removed.
_FINAL_JOB = {state.value for state in JobState if state.final}
_FINAL_BATCH = {state.value for state in BatchState if state.final}
_DELETE = 1_000  # objects a call
_STEP = 500  # entries of an index at a time
_JOB = re.compile(r"(?P<job>batch_[0-9a-z]{26}-\d+|[0-9a-hjkmnp-tv-z]{26})/(?P<attempt>\d+-[0-9a-f]+)/[^/]+")
_BATCH = re.compile(r"batches/(?P<batch>batch_[0-9a-z]{26})/.+")
_UPLOAD = re.compile(r"uploads/(?P<upload>[0-9a-f]{64})\.png")
_FILE = re.compile(r"files/(?P<tenant>[^/]+)/(?P<file>file-[0-9a-f]+)")
_INCOMING = re.compile(r"incoming/[^/]+/[A-Za-z0-9_-]{43}")
_KINDS = {
    Kind.IMAGES: _JOB,
    Kind.BATCHES: _BATCH,
    Kind.UPLOADS: _UPLOAD,
    Kind.FILES: _FILE,
    Kind.INCOMING: _INCOMING,
}


class Collector(Scripted):
    """Used by one thread, for one collection. Raises RedisUnavailable and StorageUnavailable; then start another."""

    def __init__(
        self,
        redis: Redis,
        storage: Storage,
        *,
        key_prefix: str,
        bucket: str,
        retention_seconds: float,
        older_than_seconds: float | None = None,
        safe_seconds: float = SAFE_SECONDS,
    ) -> None:
        """Nothing younger than `safe_seconds` is removed, nor anything younger than `older_than_seconds`.

        Uploads are also kept for `retention_seconds`, because a client may use one long after uploading it.
        """
        super().__init__(redis, key_prefix=key_prefix)
        self._storage = storage
        self._identity = BucketIdentity(redis, self.keys, storage, bucket=bucket)
        self._age = max(safe_seconds, older_than_seconds or 0.0)
        self._upload_age = max(self._age, retention_seconds)
        self._doomed: list[str] = []

    @said_clearly
    def run(self, *, dry_run: bool = False, force: bool = False) -> Report:
        """Check everything once and remove what is unreferenced, unless `dry_run` is set.

        Raises:
            GcRefused: Redis seems to have lost data, and `force` was not given. Nothing was removed.
        """
        began = time.monotonic()
        report = self._report = Report(dry_run=dry_run)
        tied_before = force or dry_run or self._identity.verify()
        now = self._storage.now()
        self._before, self._uploads_before = now - self._age, now - self._upload_age
        self._references = References(self._redis, self.keys, self._storage)
        self._trusted = tied_before or self._references.records > 0
        if self._trusted and not dry_run:
            self._identity.record()
        for page in self._storage.pages():
            self._look(page)
        self._flush()
        self._abort_unfinished(now - max(_DAY, self._age))
        self._trim_indexes()
        report.seconds = time.monotonic() - began
        return report

    # ---- the bucket

    def _look(self, page: Sequence[StoredObject]) -> None:
        found: dict[Kind, list[tuple[StoredObject, re.Match[str]]]] = {kind: [] for kind in _KINDS}
        for item in page:
            for kind, pattern in _KINDS.items():
                if match := pattern.fullmatch(item.key):
                    found[kind].append((item, match))
                    break
            else:
                if item.key != IDENTITY_KEY:
                    self._report[Kind.FOREIGN].kept += 1
        judges: dict[Kind, Callable[[list[re.Match[str]]], Iterable[bool]]] = {
            Kind.IMAGES: self._images_wanted,
            Kind.BATCHES: self._batches_wanted,
            Kind.FILES: self._files_wanted,
            Kind.UPLOADS: lambda matches: (self._references.has_upload(match["upload"]) for match in matches),
            Kind.INCOMING: lambda matches: (False for _ in matches),
        }
        for kind, items in found.items():
            before = self._uploads_before if kind is Kind.UPLOADS else self._before
            old = [(item, match) for item, match in items if item.modified < before]
            self._report[kind].young += len(items) - len(old)
            wanted = judges[kind]([match for _, match in old])
            for (item, _), keep in zip(old, wanted, strict=True):
                if keep:
                    self._report[kind].kept += 1
                else:
                    self._remove(kind, item)

    def _images_wanted(self, matches: list[re.Match[str]]) -> Iterator[bool]:
        """Keeps those of unfinished jobs, of a finished job's winning attempt, and those with another reference."""
        ids = sorted({match["job"] for match in matches})
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in ids:
            pipeline.hmget(self.keys.job(job_id), "state", "images")
        records = dict(zip(ids, pipeline.execute(), strict=True))
        for match in matches:
            state, images = records[match["job"]]
            folder = f"{match['job']}/{match['attempt']}"
            live = state is not None and state not in _FINAL_JOB
            yield live or f"{folder}/" in (images or "") or self._references.has_folder(folder)

    def _batches_wanted(self, matches: list[re.Match[str]]) -> Iterator[bool]:
        """Keeps everything of an unfinished batch, and what the record names of a finished one."""
        ids = sorted({match["batch"] for match in matches})
        pipeline = self._redis.pipeline(transaction=False)
        for batch_id in ids:
            pipeline.hmget(self.keys.batch(batch_id), "state", "manifest", "output", "errors")
        records = dict(zip(ids, pipeline.execute(), strict=True))
        for match in matches:
            state, *named = records[match["batch"]]
            yield state is not None and (state not in _FINAL_BATCH or match[0] in named)

    def _files_wanted(self, matches: list[re.Match[str]]) -> list[bool]:
        pipeline = self._redis.pipeline(transaction=False)
        for match in matches:
            pipeline.hexists(self.keys.files(match["tenant"]), match["file"])
        return list(pipeline.execute())

    def _remove(self, kind: Kind, item: StoredObject) -> None:
        self._check_trust()
        tally = self._report[kind]
        if kind is Kind.UPLOADS and not self._report.dry_run:
            # The same image may be uploaded again at any time under the same key: remove it only if it is still old.
            age = self._storage.age(item.key)
            if age is None:
                return
            if age < self._upload_age:
                tally.young += 1
                return
            self._storage.delete(item.key)
        else:
            self._doomed.append(item.key)
        tally.removed += 1
        tally.removed_bytes += item.bytes
        if len(self._doomed) == _DELETE:
            self._flush()

    def _check_trust(self) -> None:
        """Called before anything is removed. Raises GcRefused."""
        if not self._trusted:
            raise GcRefused(
                f"Redis (prefix {self.keys.prefix!r}) has no record of any job or batch, but the bucket has objects "
                "that would be removed: Redis has lost data, it is another Redis, or all records have expired. Check "
                "CALOTYPE_REDIS_URL, CALOTYPE_KEY_PREFIX and CALOTYPE_S3_BUCKET, see what --dry-run prints, and use "
                "--force if they are right"
            )

    def _flush(self) -> None:
        if not self._report.dry_run:
            self._storage.delete_many(self._doomed)
        self._doomed.clear()

    def _abort_unfinished(self, before: float) -> None:
        for upload in self._storage.unfinished_uploads():
            if not upload.key.startswith(("batches/", "files/")):
                self._report[Kind.FOREIGN].kept += 1
            elif upload.begun >= before:
                self._report[Kind.UNFINISHED].young += 1
            else:
                self._check_trust()
                self._report[Kind.UNFINISHED].removed += 1
                if not self._report.dry_run:
                    self._storage.abort_upload(upload.key, upload.id)

    # ---- Redis

    def _trim_indexes(self) -> None:
        """Removes entries without a record. Both are written in one step, so no entry is ahead of its record."""
        tenants = sorted(map(str, self._redis.smembers(self.keys.tenants)))
        indexes: list[tuple[str, Callable[[str], str]]] = [(self.keys.dead, self.keys.job)]
        indexes += [(self.keys.recent(tenant), self.keys.job) for tenant in tenants]
        indexes += [(self.keys.batches(tenant), self.keys.batch) for tenant in tenants]
        for index, record in indexes:
            cursor = 0
            while True:
                cursor, entries = self._redis.zscan(index, cursor, count=_STEP)
                ids = [str(member) for member, _ in entries]
                gone = self._gone(ids, record)
                self._report[Kind.INDEX].kept += len(ids) - len(gone)
                self._report[Kind.INDEX].removed += len(gone)
                if gone and not self._report.dry_run:
                    self._redis.zrem(index, *gone)
                if not cursor:
                    break

    def _gone(self, ids: list[str], record: Callable[[str], str]) -> list[str]:
        pipeline = self._redis.pipeline(transaction=False)
        for found in ids:
            pipeline.exists(record(found))
        there: list[Any] = pipeline.execute()
        return [found for found, exists in zip(ids, there, strict=True) if not exists]
