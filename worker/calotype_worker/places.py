"""`Places`: keeps room for urgent jobs while a worker is full of patient ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

RESERVED = 8  # threads that only urgent jobs get
_LOOK_SECONDS = 0.1  # between looks for urgent jobs while full
_HOLD_SECONDS = 1.0  # then the message is given back: another worker may have room


class Places:
    """At most `patient` patient jobs run at a time; urgent ones take any thread that is left.

    A thread whose message is for a patient job while all those places are taken waits a moment for one. It does so
    usefully: the message is an invitation and no job, so meanwhile the thread takes urgent jobs if there are any.
    """

    def __init__(self, patient: int) -> None:
        self._free = threading.Semaphore(patient)
        self._scout = threading.Lock()  # one of the waiting threads looks for urgent jobs

    @contextmanager
    def patient(self, look: Callable[[], T | None], *, stopped: Callable[[], bool]) -> Iterator[T | bool]:
        """Yields True with a place taken, an urgent job that `look` found, or False if neither came in time."""
        ends = time.monotonic() + _HOLD_SECONDS
        while not stopped():
            if self._free.acquire(timeout=_LOOK_SECONDS):
                try:
                    yield True
                finally:
                    self._free.release()
                return
            found = self._look(look)
            if found is not None:
                yield found
                return
            if time.monotonic() >= ends:
                break
        yield False

    def _look(self, look: Callable[[], T | None]) -> T | None:
        if not self._scout.acquire(blocking=False):
            return None
        try:
            return look()
        finally:
            self._scout.release()
