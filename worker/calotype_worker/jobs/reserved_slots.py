"""`ReservedSlots`: keeps threads free for interactive jobs while other jobs fill the worker."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

RESERVED = 8  # threads for interactive jobs only
_HOLD_SECONDS = 1.0  # after this time, the last message of a queue is returned: another worker may have a free thread
_LOOK_SECONDS = 1.0  # between checks for interactive jobs whose notice was lost
_TURN_SECONDS = 0.2  # between questions whether to stop


class ReservedSlots:
    """At most `bulk_slots` non-interactive jobs run at a time; interactive ones may use all remaining threads.

    A thread whose message is for a non-interactive job waits while all those places are taken. It uses this time:
    the message only announces that a job exists, so the thread meanwhile runs an interactive job if there is one.
    """

    def __init__(self, bulk_slots: int) -> None:
        self._changed = threading.Condition()
        self._free = bulk_slots
        self._interactive = False  # whether an interactive job may be waiting
        self._looked_at = -math.inf
        self._asked_at: dict[str, float] = {}  # by queue: when a thread last checked it for spare messages

    def interactive_arrived(self) -> None:
        """Tell one of the waiting threads to look for an interactive job."""
        with self._changed:
            self._interactive = True
            self._changed.notify()

    @contextmanager
    def bulk(
        self, queue: str, look: Callable[[], T | None], *, stopped: Callable[[], bool], spare: Callable[[str], bool]
    ) -> Iterator[T | bool]:
        """Yields True when it has a place, an interactive job that `look` found, or False if neither came in time.

        It keeps waiting while the queue has messages to `spare` for other workers.
        """
        found = self._wait(queue, look, stopped, spare)
        try:
            yield found
        finally:
            if found is True:
                with self._changed:
                    self._free += 1
                    self._changed.notify()

    def _wait(
        self, queue: str, look: Callable[[], T | None], stopped: Callable[[], bool], spare: Callable[[str], bool]
    ) -> T | bool:
        came_at = time.monotonic()
        while not stopped():
            with self._changed:
                if self._free:
                    self._free -= 1
                    return True
                now = time.monotonic()
                looks = self._interactive or now - self._looked_at >= _LOOK_SECONDS
                asks = now - max(came_at, self._asked_at.get(queue, came_at)) >= _HOLD_SECONDS
                if looks:
                    self._interactive, self._looked_at = False, now
                if asks:
                    self._asked_at[queue] = now
                if not (looks or asks):
                    self._changed.wait(_TURN_SECONDS)
            if looks and (found := look()) is not None:
                self.interactive_arrived()  # there may be more than one
                return found
            if asks and not spare(queue):
                self._asked_at.pop(queue, None)  # the next thread checks again: this message is now spare
                return False
        return False
