"""`ReservedSlots`: keeps room for urgent jobs while a worker is full of patient ones."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

RESERVED = 8  # threads that only urgent jobs get
_HOLD_SECONDS = 1.0  # then, or later, a message is given back if it is the last: another worker may have room
_LOOK_SECONDS = 1.0  # between looks for urgent jobs of which no notice came
_TURN_SECONDS = 0.2  # between questions whether to stop


class ReservedSlots:
    """At most `patient` patient jobs run at a time; urgent ones take any thread that is left.

    A thread whose message is for a patient job while all those places are taken waits for one. It does so usefully:
    the message is an invitation and no job, so meanwhile the thread takes an urgent job when there is one.
    """

    def __init__(self, bulk_slots: int) -> None:
        self._changed = threading.Condition()
        self._free = bulk_slots
        self._interactive = False  # whether an urgent job may wait
        self._looked_at = -math.inf
        self._asked_at: dict[str, float] = {}  # by queue: when a thread last asked, for all, if it has any to spare

    def interactive_arrived(self) -> None:
        """One of the threads that wait is to look for an urgent job."""
        with self._changed:
            self._interactive = True
            self._changed.notify()

    @contextmanager
    def bulk(
        self, queue: str, look: Callable[[], T | None], *, stopped: Callable[[], bool], spare: Callable[[str], bool]
    ) -> Iterator[T | bool]:
        """Yields True with a place taken, an urgent job that `look` found, or False if neither came in time.

        That is, while that queue had messages to `spare` for other workers.
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
                self.interactive_arrived()  # it may not have come alone
                return found
            if asks and not spare(queue):
                self._asked_at.pop(queue, None)  # the next one asks for itself: this message is now one to spare
                return False
        return False
