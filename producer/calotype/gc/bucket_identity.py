"""`BucketIdentity`: checks that a bucket and a Redis belong together, and that neither was reset to an older state.

A collection removes what Redis does not know. With a Redis that has lost its data, is an older copy, or belongs to
another deployment, it would remove everything. Both sides keep a name and the number of collections so far.
"""

from __future__ import annotations

import json
import secrets

from redis import Redis

from calotype_shared.errors import CalotypeError, ObjectMissing
from calotype_shared.queue.keys import Keys
from calotype_shared.storage.s3 import Storage

IDENTITY_KEY = "calotype-gc.json"  # the bucket's side


class GcRefused(CalotypeError):
    """Redis and the bucket do not match. Nothing was removed."""

    code = "gc_refused"


class BucketIdentity:
    """Between one bucket and one key prefix."""

    def __init__(self, redis: Redis, keys: Keys, storage: Storage, *, bucket: str) -> None:
        self._redis = redis
        self._key = keys.gc
        self._prefix = keys.prefix
        self._storage = storage
        self._bucket = bucket

    def verify(self) -> bool:
        """Whether there was a collection before. Raises GcRefused if the two sides disagree."""
        here: dict[str, str] = self._redis.hgetall(self._key)  # type: ignore[assignment]
        there = self._read()
        runs = int(here.get("runs", 0))
        if (bucket := here.get("bucket", self._bucket)) != self._bucket:
            raise self._refused(f"its last collection was for the bucket {bucket!r}")
        if not there:
            if runs > 1:  # else the very first one was interrupted
                raise self._refused("it has recorded earlier collections, and the bucket has not")
            return False
        if not here:
            problem = (
                "the bucket has recorded earlier collections, and it has not: its data is lost, or it is another Redis"
            )
            raise self._refused(problem)
        if here["name"] != there["name"]:
            raise self._refused("the bucket belongs to another Redis")
        if runs < int(there["runs"]):
            raise self._refused(
                f"it has recorded {runs} collections and the bucket {there['runs']}: it is an older copy"
            )
        return True

    def record(self) -> None:
        """Record the collection on both sides. Concurrent ones count up; the bucket is never ahead of Redis."""
        there = self._read()
        self._redis.hsetnx(self._key, "name", there.get("name") or secrets.token_hex(8))
        self._redis.hset(self._key, "bucket", self._bucket)
        runs = self._redis.hincrby(self._key, "runs", 1)
        if runs <= int(there.get("runs", 0)):  # forced, after Redis was restored
            runs = int(there["runs"]) + 1
            self._redis.hset(self._key, "runs", str(runs))
        name = self._redis.hget(self._key, "name")
        side = {"name": name, "runs": runs, "key_prefix": self._prefix}
        self._storage.put(IDENTITY_KEY, json.dumps(side).encode(), "application/json")

    def _read(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(self._storage.get(IDENTITY_KEY))
        except ObjectMissing:
            return {}
        return found

    def _refused(self, problem: str) -> GcRefused:
        return GcRefused(
            f"Redis (prefix {self._prefix!r}) does not match the bucket {self._bucket!r}: {problem}. "
            "Objects that it does not know would be removed. Check CALOTYPE_REDIS_URL, CALOTYPE_KEY_PREFIX and "
            "CALOTYPE_S3_BUCKET, see what --dry-run prints, and use --force if they are right"
        )
