"""`Pace`: keeps the host close to its device, and says how long steps took there.

A GPU takes orders and answers later: without this the engine would order many steps ahead of it. Who joins or leaves
then would wait for all of them, and the time between two orders would say nothing about a step's cost. One step ahead
is enough to keep the device busy while the host looks after its requests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

Key = TypeVar("Key")
T = TypeVar("T")


class Event(Protocol):
    """A moment in a device's stream of work, as `torch.cuda.Event` is."""

    def record(self) -> Any: ...

    def synchronize(self) -> Any:
        """Wait until the device gets there. Lets other threads run meanwhile."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to there."""
        ...


class Pace(Generic[Key]):
    """Owned by the engine's thread. `make_event` is None for devices that have done a thing when the call returns."""

    def __init__(self, make_event: Callable[[], Event] | None = None, *, ahead: int = 1) -> None:
        self._make_event = make_event
        self._ahead = ahead
        self._ordered: deque[tuple[Key, Event, Event]] = deque()
        self._measured: list[tuple[Key, float]] = []

    def step(self, key: Key, order: Callable[[], T]) -> T:
        """Call `order`; returns once at most `ahead` steps are not done."""
        if self._make_event is None:
            began = time.monotonic()
            result = order()
            self._measured.append((key, time.monotonic() - began))
            return result
        start, end = self._make_event(), self._make_event()
        start.record()
        result = order()
        end.record()
        self._ordered.append((key, start, end))
        while len(self._ordered) > self._ahead:
            done, start, end = self._ordered.popleft()
            end.synchronize()
            self._measured.append((done, start.elapsed_time(end) / 1e3))
        return result

    def measured(self) -> list[tuple[Key, float]]:
        """Seconds of the steps that are done, each told once."""
        found, self._measured = self._measured, []
        return found


def events_of(device: torch.device) -> Callable[[], Event] | None:
    """What marks moments on this device; None where nothing needs to."""
    if device.type != "cuda":
        return None

    def make() -> Event:
        with torch.cuda.device(device):
            return cast("Event", torch.cuda.Event(enable_timing=True))

    return make
