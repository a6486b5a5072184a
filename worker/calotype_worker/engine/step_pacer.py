"""`StepPacer`: keeps the host close to its device, and knows what a step costs there.

A GPU takes orders and answers later: without this the engine would order many steps ahead of it. Who joins or leaves
then would wait for all of them, and the time between two orders would say nothing about a step's cost. One step ahead
is enough to keep the device busy while the host looks after its requests.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")

_STEPS = 8  # whose times are remembered
_GROUPS = 128


class Event(Protocol):
    """A moment in a device's stream of work, as `torch.cuda.Event` is."""

    def record(self) -> Any: ...

    def synchronize(self) -> Any:
        """Wait until the device gets there. Lets other threads run meanwhile."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to there."""
        ...


class StepPacer(Generic[Key]):
    """Owned by the engine's thread. `make_event` is None for devices that have done a thing when the call returns."""

    def __init__(self, make_event: Callable[[], Event] | None = None, *, ahead: int = 1) -> None:
        self._make_event = make_event
        self._ahead = ahead
        self._ordered: deque[tuple[Key, Event, Event]] = deque()
        self._seconds: OrderedDict[Key, deque[float]] = OrderedDict()  # the last used at the end

    def step(self, key: Key, order: Callable[[], T]) -> T:
        """Call `order`; returns once at most `ahead` steps are not done."""
        if self._make_event is None:
            began = time.monotonic()
            result = order()
            self._note(key, time.monotonic() - began)
            return result
        start, end = self._make_event(), self._make_event()
        start.record()
        result = order()
        end.record()
        self._ordered.append((key, start, end))
        while len(self._ordered) > self._ahead:
            done, start, end = self._ordered.popleft()
            end.synchronize()
            self._note(done, start.elapsed_time(end) / 1e3)
        return result

    def cost(self, key: Key) -> float:
        """Seconds of a group's next step: the least of its last ones, for a stall of the machine is none of its own."""
        return min(self._seconds[key]) if key in self._seconds else 0.0

    def _note(self, key: Key, seconds: float) -> None:
        self._seconds.setdefault(key, deque(maxlen=_STEPS)).append(seconds)
        self._seconds.move_to_end(key)
        while len(self._seconds) > _GROUPS:
            self._seconds.popitem(last=False)


def events_of(device: torch.device) -> Callable[[], Event] | None:
    """What marks moments on this device, in a thread that works on it; None where nothing needs to."""
    if device.type != "cuda":
        return None

    return lambda: cast("Event", torch.cuda.Event(enable_timing=True))


def work_on(device: torch.device) -> None:
    """What this thread orders without naming a device is for that one: moments, generated kernels, pinned memory."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
