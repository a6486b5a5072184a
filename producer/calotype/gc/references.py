"""`References`: all objects that records or results of batches refer to and that a look-up would not find.

An image may also belong to another job: equal jobs share images, and results of batches name images of jobs whose
records are gone. References are only copied in one direction (a finished job's shared images, then a record,
then a batch's results) and are read in that order, so one that is copied meanwhile is found at its destination.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from redis import Redis

from calotype.batches.lines import LONGEST_LINE
from calotype.batches.record import BatchState
from calotype.gc.bloom import BloomFilter
from calotype_shared.errors import ObjectMissing
from calotype_shared.queue.keys import Keys
from calotype_shared.schema.enums import JobState
from calotype_shared.storage.layout import attempt_folder
from calotype_shared.storage.multipart import read_lines
from calotype_shared.storage.s3 import Storage

_FINAL = {state.value for state in BatchState if state.final}
_STEP = 500  # keys read at a time
_LONGEST_RESULT = 2**24  # bytes
_TRIES = 3  # at a batch that is finished while it is looked at
# Whatever looks like a key counts as one, in any format of any version: keeping too much does no harm.
_FOLDER = re.compile(r"[0-9a-z_-]{26,}/\d+-[0-9a-f]+(?=/)")
_UPLOAD = re.compile(r"[0-9a-f]{64}")


class References:
    """Collected once, in bounded steps and fixed memory; queried often."""

    def __init__(self, redis: Redis, keys: Keys, storage: Storage) -> None:
        """Raises StorageUnavailable."""
        self._redis = redis
        self._keys = keys
        self._storage = storage
        self._folders, self._uploads = BloomFilter(), BloomFilter()
        self.records = 0  # of jobs and batches
        for made in self._scan(keys.finished("*")):
            pipeline = redis.pipeline(transaction=False)
            for key in made:
                pipeline.get(key)
            self._note(self._folders, _FOLDER, pipeline.execute())
        for jobs in self._scan(keys.job("*")):
            self._read_jobs(jobs)
        for batches in self._scan(keys.batch("*")):
            for key in batches:
                self.records += 1
                self._read_batch(key)

    def has_folder(self, folder: str) -> bool:
        return folder in self._folders

    def has_upload(self, upload_id: str) -> bool:
        return upload_id in self._uploads

    def _scan(self, pattern: str) -> Iterator[list[str]]:
        """Keys a few hundred at a time; all that are there all along, some of them twice."""
        cursor = 0
        while True:
            cursor, found = self._redis.scan(cursor, match=pattern, count=_STEP)
            yield list(map(str, found))
            if not cursor:
                return

    @staticmethod
    def _note(known: BloomFilter, pattern: re.Pattern[str], texts: list[str | None]) -> None:
        for text in texts:
            for found in pattern.findall(text or ""):
                known.add(found)

    def _read_jobs(self, keys: list[str]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for key in keys:
            pipeline.hmget(key, "state", "config", "images", "attempt", "token")
        for key, (state, config, images, attempt, token) in zip(keys, pipeline.execute(), strict=True):
            self.records += state is not None
            self._note(self._uploads, _UPLOAD, [config])
            self._note(self._folders, _FOLDER, [images])
            if state == JobState.RUNNING.value:
                # The job may finish, and its record expire, before its images are checked.
                self._folders.add(attempt_folder(key.removeprefix(self._keys.job("")), int(attempt), token))

    def _read_batch(self, key: str) -> None:
        batch_id = key.removeprefix(self._keys.batch(""))
        for _ in range(_TRIES):
            found: list[Any] = self._redis.hmget(key, "state", "manifest", "output")
            state, manifest, output = found
            if state is None:  # it has just expired
                return
            parts = list(map(str, self._redis.lrange(self._keys.parts(batch_id), 0, -1)))
            try:
                for name in [output] if output else parts:
                    for line in read_lines(self._storage, name, longest=_LONGEST_RESULT):
                        self._note(self._folders, _FOLDER, [line.data.decode(errors="replace")])
                if state not in _FINAL and self._storage.exists(manifest):  # its lines do not have records yet
                    for line in read_lines(self._storage, manifest, longest=LONGEST_LINE):
                        self._note(self._uploads, _UPLOAD, [line.data.decode(errors="replace")])
            except ObjectMissing:  # parts are joined and removed when the batch is finished: read it again
                continue
            return
