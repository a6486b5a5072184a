"""Objects in storage that are too large for memory: read line by line, written part by part."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from calotype_shared.storage.s3 import Storage

CHUNK = 8 * 2**20  # bytes read or written at a time; S3 requires parts of at least 5 MiB


class Line(NamedTuple):
    number: int  # from 1
    data: bytes  # without the line break


def read_chunks(storage: Storage, key: str) -> Iterator[bytes]:
    """An object's bytes, a few MiB at a time. Each part is a separate request, so that it can be repeated."""
    start = 0
    while data := storage.get_range(key, start, CHUNK):
        yield data
        start += len(data)
        if len(data) < CHUNK:
            return


def read_lines(storage: Storage, key: str, *, longest: int = 2**20) -> Iterator[Line]:
    """The lines of an object. A line longer than `longest` bytes is cut to `longest + 1`."""
    rest, number = b"", 0
    for chunk in read_chunks(storage, key):
        *whole, rest = (rest + chunk).split(b"\n")
        for data in whole:
            number += 1
            yield Line(number, data[: longest + 1])
        if len(rest) > longest:  # such a line is refused, so its start is sufficient
            rest = rest[: longest + 1]
    if rest:
        yield Line(number + 1, rest[: longest + 1])


class ObjectWriter:
    """A context manager that writes one object of any size. If it exits with an exception, there is no object."""

    def __init__(self, storage: Storage, key: str, *, content_type: str = "application/jsonl") -> None:
        self._storage = storage
        self._key = key
        self._content_type = content_type
        self._buffer = bytearray()
        self._upload: str | None = None
        self._tags: list[str] = []
        self.bytes = 0

    def write(self, data: bytes) -> None:
        """Raises StorageUnavailable."""
        self._buffer += data
        self.bytes += len(data)
        while len(self._buffer) >= CHUNK:
            self._send(CHUNK)

    def _send(self, size: int) -> None:
        if self._upload is None:
            self._upload = self._storage.begin_upload(self._key, self._content_type)
        part = bytes(self._buffer[:size])
        self._tags.append(self._storage.upload_part(self._key, self._upload, len(self._tags) + 1, part))
        del self._buffer[:size]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._upload is not None:
                self._storage.abort_upload(self._key, self._upload)
        elif self._upload is None:
            self._storage.put(self._key, bytes(self._buffer), self._content_type)
        else:
            if self._buffer:
                self._send(len(self._buffer))
            self._storage.complete_upload(self._key, self._upload, self._tags)
