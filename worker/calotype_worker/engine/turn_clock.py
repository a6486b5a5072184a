"""`TurnClock`: notices that an engine makes no progress, as when its device hangs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

COSTS = 20  # a turn may take this many times its group's usual cost
UNMEASURED = 10  # a turn of unknown cost may load a model or compile kernels: this many times the usual limit


class TurnClock:
    """The engine's thread marks its turns; any thread asks. `limit_seconds` is the least that every turn may take."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._turn: tuple[float, float, str] | None = None  # began, may take, what it does; replaced as a whole

    @contextmanager
    def turn(self, doing: str, *, cost: float) -> Iterator[None]:
        """A turn of the engine's loop that usually takes `cost` seconds; 0: not known."""
        allowed = max(self._limit_seconds, COSTS * cost) if cost else UNMEASURED * self._limit_seconds
        self._turn = (time.monotonic(), allowed, doing)
        try:
            yield
        finally:
            self._turn = None

    @property
    def overdue(self) -> str | None:
        """What the engine hangs in, and since when; None while it makes progress or has nothing to do."""
        turn = self._turn
        if turn is None:
            return None
        began, allowed, doing = turn
        seconds = time.monotonic() - began
        return f"{doing} takes {seconds:.0f} s; at most {allowed:.0f} s are allowed" if seconds > allowed else None
