"""`TraceFile`: writes a timeline of the engine and the job threads for Chrome's and Perfetto's trace viewers.

Open the file at https://ui.perfetto.dev or chrome://tracing. Format: "Trace Event Format", JSON array of complete
events; the closing bracket may be missing, so a file is readable while its worker runs and after it was killed.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_WAITING_AT_MOST = 100_000  # events
_MOST_BYTES = 512 * 2**20


class TraceFile:
    """A `Tracer` that writes in its own thread. Thread-safe; never blocks the caller, never raises."""

    def __init__(self, path: Path, *, process: str) -> None:
        """Raises OSError if the file cannot be written."""
        self._file = path.open("w", encoding="utf-8")
        self._pid = os.getpid()
        self._tracks: dict[str, int] = {}
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING_AT_MOST)
        self._bytes = 0
        self.dropped = 0  # events lost because the disk was too slow or the file too large
        self._file.write("[\n")
        self._put({"ph": "M", "name": "process_name", "pid": self._pid, "tid": 0, "args": {"name": process}})
        self._thread = threading.Thread(target=self._write, name="calotype-trace", daemon=True)
        self._thread.start()

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        if track not in self._tracks:
            number = self._tracks.setdefault(track, len(self._tracks) + 1)
            self._put({"ph": "M", "name": "thread_name", "pid": self._pid, "tid": number, "args": {"name": track}})
        self._put(
            {
                "ph": "X",
                "name": name,
                "pid": self._pid,
                "tid": self._tracks[track],
                "ts": round(began * 1e6, 1),
                "dur": round((ended - began) * 1e6, 1),
                "args": facts,
            }
        )

    def wait(self, name: str, identity: str, began: float, ended: float) -> None:
        shared = {"cat": name, "name": name, "id": identity, "pid": self._pid, "tid": 0}
        self._put({"ph": "b", "ts": round(began * 1e6, 1), **shared})
        self._put({"ph": "e", "ts": round(ended * 1e6, 1), **shared})

    def close(self) -> None:
        """Write the waiting events, and end the file."""
        self._waiting.put(None)
        self._thread.join()

    def _put(self, event: dict[str, Any]) -> None:
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        try:
            while (event := self._waiting.get()) is not None:
                if self._bytes > _MOST_BYTES:
                    self.dropped += 1
                    continue
                line = json.dumps(event)
                self._bytes += len(line) + 2
                self._file.write(f"{line},\n")
                if self._waiting.empty():
                    self._file.flush()
            # A last event, for JSON has no comma before the bracket.
            last = {"ph": "M", "name": "dropped_events", "pid": self._pid, "tid": 0, "args": {"count": self.dropped}}
            self._file.write(f"{json.dumps(last)}\n]\n")
            self._file.close()
        except OSError as error:
            self._bytes = _MOST_BYTES + 1
            log.warning("trace file ended early", extra={"reason": str(error)})
            while self._waiting.get() is not None:
                pass
