"""`Spool`: a folder of bounded size where finished files wait while the storage is unavailable."""

from __future__ import annotations

import errno
import fcntl
import shutil
import tempfile
import threading
import uuid
from pathlib import Path

_PREFIX = "calotype-spool-"


class SpoolFull(OSError):
    """The bound is reached. A full disk raises OSError all the same."""


class Spool:
    """Belongs to one process. Files of a dead process are useless to others; the next one to start removes them.

    Thread-safe.
    """

    def __init__(self, parent: Path | None = None, *, max_bytes: int) -> None:
        """Raises OSError if no folder can be created in `parent`, by default the system's temporary folder."""
        parent = parent or Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # for its owner only
        self._owner = (self.folder / "lock").open("w")
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        self.max_bytes = max_bytes
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that wait now."""
        return self._used

    def put(self, data: bytes) -> Path:
        """Store a file. Raises SpoolFull, or OSError if the disk is full; then nothing is stored."""
        with self._lock:
            if self._used + len(data) > self.max_bytes:
                raise SpoolFull(errno.ENOSPC, f"the spool is full: {self._used} of {self.max_bytes} bytes are used")
            self._used += len(data)
        path = self.folder / uuid.uuid4().hex
        try:
            path.write_bytes(data)
        except OSError:
            path.unlink(missing_ok=True)
            with self._lock:
                self._used -= len(data)
            raise
        return path

    def remove(self, path: Path) -> None:
        size = path.stat().st_size
        path.unlink()
        with self._lock:
            self._used -= size

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._owner.close()


def _remove_abandoned(parent: Path) -> None:
    """Folders of ended processes: nobody holds their lock."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            with (folder / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use, being created, or owned by another user
