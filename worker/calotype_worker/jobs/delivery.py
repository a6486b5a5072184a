"""`PendingResult`: the files of one attempt at a job; `UploadQueue`: delivers them to storage, also after an outage."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from queue import Empty, Full, Queue

from opentelemetry.trace import INVALID_SPAN, Span

from calotype_shared.backoff import delays
from calotype_shared.errors import StorageUnavailable
from calotype_shared.schema.jobs import ImageRef
from calotype_shared.storage.s3 import Storage
from calotype_worker.jobs.heartbeat import RunningJob
from calotype_worker.jobs.spool import Spool
from calotype_worker.output.file import File

log = logging.getLogger(__name__)

_THREADS = 4
_MAX_PENDING = 1_000
_AWAY_SECONDS = 10.0  # after a failure: how long files go to the spool without an upload attempt
_BACKOFF_SECONDS = (0.5, 15.0)
_LOOK_SECONDS = 0.2


@dataclass(kw_only=True, eq=False)
class PendingResult:
    """Owned by one thread at a time."""

    job: RunningJob
    span: Span = INVALID_SPAN  # of the attempt
    files: list[File] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)  # seconds by phase
    steps: int = 0  # network evaluations of the images so far
    commit_unknown: bool = False  # a commit was sent and its response was lost

    @property
    def stored(self) -> bool:
        return all(file.stored for file in self.files)


class UploadQueue:
    """While storage is available, job threads upload their own files and this queue stays empty.

    While storage is unavailable, results wait here with their files on disk, and job threads continue with other jobs.
    When the spool is full, the job threads block, so the worker stops claiming jobs. The upload threads call
    `finish(result)`, which calls `deliver`.
    """

    def __init__(self, storage: Storage, spool: Spool, *, finish: Callable[[PendingResult], None]) -> None:
        self._storage = storage
        self._spool = spool
        self._finish = finish
        self._waiting: Queue[PendingResult] = Queue(maxsize=_MAX_PENDING)
        self._away_until = 0.0
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"calotype-delivery-{number}", daemon=True)
            for number in range(_THREADS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Call it when no pending result is left."""
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._spool.close()

    @property
    def away(self) -> bool:
        """Whether the storage is known to be unavailable."""
        return time.monotonic() < self._away_until

    def try_store(self, pending: PendingResult, files: Iterable[File]) -> bool:
        """Store files now, unless the storage is known to be unavailable. Returns whether all are stored.

        Raises:
            CancelledError: the claim is lost, or the job is being returned to its queue.
        """
        if self.away:
            return False
        try:
            for file in files:
                self._store(pending, file)
        except StorageUnavailable as error:
            self._gone(error)
            return False
        return True

    def leave(self, pending: PendingResult) -> bool:
        """Take over a pending result, if there is space for its unstored files. If not, it is unchanged."""
        try:
            for file in pending.files:
                if not file.stored and file.path is None:
                    assert file.data is not None
                    file.path = self._spool.put(file.data)
                    file.data = None
            self._waiting.put_nowait(pending)
        except (OSError, Full) as error:
            log.warning("images cannot be spooled", extra={"job_id": pending.job.claim.job_id, "reason": str(error)})
            return False
        log.info("images spooled", extra={"job_id": pending.job.claim.job_id, "bytes": self._spool.used})
        return True

    def deliver(self, pending: PendingResult) -> None:
        """Store the unstored files, and retry until the storage accepts them.

        Raises:
            CancelledError: the claim is lost, or the job is being returned to its queue.
        """
        for pause in delays(*_BACKOFF_SECONDS):
            try:
                for file in pending.files:
                    if not file.stored:
                        self._store(pending, file)
            except StorageUnavailable as error:
                self._gone(error)
            else:
                return
            pending.job.wait_given_up(pause)

    def discard(self, pending: PendingResult) -> None:
        """Remove a pending result's files from disk and, as far as possible, from storage: nothing refers to them.

        Remaining files are removed later, because the attempt is recorded as an orphan.
        """
        self.forget(pending)
        try:
            self._storage.delete_many([file.key for file in pending.files if file.tried])
        except StorageUnavailable as error:
            log.warning(
                "orphaned objects left in storage", extra={"job_id": pending.job.claim.job_id, "reason": str(error)}
            )

    def forget(self, pending: PendingResult) -> None:
        """Remove the pending's files from disk."""
        for file in pending.files:
            if file.path is not None:
                self._spool.remove(file.path)
                file.path = None

    def _store(self, pending: PendingResult, file: File) -> None:
        if pending.job.given_up:
            raise CancelledError
        data = file.path.read_bytes() if file.path is not None else file.data
        assert data is not None
        file.tried = True
        self._storage.put(file.key, data, file.content_type)
        file.stored, file.data = True, None
        self._away_until = 0.0

    def _gone(self, error: StorageUnavailable) -> None:
        if self._away_until == 0.0:
            log.warning("storage unavailable", extra={"reason": str(error)})
        self._away_until = time.monotonic() + _AWAY_SECONDS

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                pending = self._waiting.get(timeout=_LOOK_SECONDS)
            except Empty:
                continue
            try:
                self._finish(pending)
            except Exception:  # this thread must not die
                log.exception("unexpected error in the upload queue")
