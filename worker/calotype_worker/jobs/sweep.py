"""Removes what attempts without a commit have left in storage."""

from __future__ import annotations

from calotype_shared.queue.job_store import JobStore
from calotype_shared.storage.s3 import Storage


def sweep(store: JobStore, storage: Storage, *, older_than_seconds: float) -> int:
    """Empty the folders of attempts that ended at least so long ago; returns how many folders.

    Give even a worker that was frozen the time to find its claim lost: what it writes later nobody sweeps.
    Raises ServiceUnavailable; a folder is forgotten only once it is empty.
    """
    folders = store.orphans(older_than_seconds=older_than_seconds)
    for folder in folders:
        keys = list(storage.list(f"{folder}/"))
        for start in range(0, len(keys), 1000):
            storage.delete_many(keys[start : start + 1000])
        store.swept([folder])
    return len(folders)
