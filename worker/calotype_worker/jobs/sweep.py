"""Removes files of uncommitted attempts from storage."""

from __future__ import annotations

from calotype_shared.queue.job_store import JobStore
from calotype_shared.storage.s3 import Storage


def sweep(store: JobStore, storage: Storage, *, older_than_seconds: float) -> int:
    """Delete the files of attempts that ended at least this long ago; returns the number of folders.

    The time must be enough for a suspended worker to notice that its claim is lost: files written later stay.
    Raises ServiceUnavailable; a folder is removed from the list only when it is empty.
    """
    folders = store.orphans(older_than_seconds=older_than_seconds)
    for folder in folders:
        keys = list(storage.list(f"{folder}/"))
        for start in range(0, len(keys), 1000):
            storage.delete_many(keys[start : start + 1000])
        store.swept([folder])
    return len(folders)
