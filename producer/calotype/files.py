"""`FileStore`: files uploaded by HTTP, such as manifests of batches. Bytes are in storage, names in Redis."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict
from redis import Redis

from calotype_shared.queue.scripts import Scripted, said_clearly
from calotype_shared.storage.multipart import CHUNK, ObjectWriter, read_chunks
from calotype_shared.storage.s3 import Storage


class StoredFile(BaseModel):
    """A file as it is listed."""

    model_config = ConfigDict(frozen=True)

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: float


class FileStore(Scripted):
    """Files of all tenants. Raises RedisUnavailable and StorageUnavailable."""

    def __init__(self, redis: Redis, storage: Storage, *, key_prefix: str) -> None:
        super().__init__(redis, key_prefix=key_prefix)
        self._storage = storage

    def key(self, tenant: str, file_id: str) -> str:
        """The storage key of its bytes."""
        return f"files/{tenant}/{file_id}"

    @said_clearly
    def add(self, source: BinaryIO, *, tenant: str, filename: str, purpose: str) -> StoredFile:
        """Store a file, a few MiB at a time; it is listed once all of it is there."""
        file_id = f"file-{secrets.token_hex(12)}"
        with ObjectWriter(self._storage, self.key(tenant, file_id)) as writer:
            while data := source.read(CHUNK):
                writer.write(data)
        stored = StoredFile(id=file_id, filename=filename, purpose=purpose, bytes=writer.bytes, created_at=time.time())
        self._redis.hset(self.keys.files(tenant), file_id, stored.model_dump_json())
        return stored

    @said_clearly
    def get(self, file_id: str, *, tenant: str) -> StoredFile | None:
        stored = self._redis.hget(self.keys.files(tenant), file_id)
        return None if stored is None else StoredFile.model_validate_json(stored)

    @said_clearly
    def all(self, *, tenant: str) -> list[StoredFile]:
        """Newest first."""
        found = [StoredFile.model_validate_json(stored) for stored in self._redis.hvals(self.keys.files(tenant))]
        return sorted(found, key=lambda file: file.created_at, reverse=True)

    @said_clearly
    def remove(self, file_id: str, *, tenant: str) -> None:
        self._redis.hdel(self.keys.files(tenant), file_id)
        self._storage.delete(self.key(tenant, file_id))

    def read(self, file_id: str, *, tenant: str) -> Iterator[bytes]:
        return read_chunks(self._storage, self.key(tenant, file_id))
