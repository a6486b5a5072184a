"""`StepPacer`: limits how far the host runs ahead of its device, and measures the cost of steps.

A GPU executes asynchronously: without a limit, the engine would launch many steps ahead of it. Requests that join or
leave would then wait for all of them, and the time between two launches would not show a step's cost. One step ahead is
enough to keep the device busy while the host handles requests.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")

_STEPS = 8  # number of latest steps whose times are kept
_GROUPS = 128


class Event(Protocol):
    """A point in a device's stream of work, like `torch.cuda.Event`."""

    def record(self) -> Any: ...

    def synchronize(self) -> Any:
        """Wait until the device reaches this point. Other threads run meanwhile."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to `end_event`."""
        ...


class StepPacer(Generic[Key]):
    """Owned by the engine's thread. `make_event` is None for devices that execute synchronously."""

    def __init__(self, make_event: Callable[[], Event] | None = None, *, ahead: int = 1) -> None:
        self._make_event = make_event
        self._ahead = ahead
        self._ordered: deque[tuple[Key, Event, Event]] = deque()
        self._seconds: OrderedDict[Key, deque[float]] = OrderedDict()  # the last used at the end

    def step(self, key: Key, order: Callable[[], T]) -> T:
        """Call `order`, then wait until at most `ahead` steps are unfinished."""
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
        """Estimated seconds of a group's next step: the minimum of its latest steps, to exclude stalls."""
        return min(self._seconds[key]) if key in self._seconds else 0.0

    def _note(self, key: Key, seconds: float) -> None:
        self._seconds.setdefault(key, deque(maxlen=_STEPS)).append(seconds)
        self._seconds.move_to_end(key)
        while len(self._seconds) > _GROUPS:
            self._seconds.popitem(last=False)


def events_of(device: torch.device) -> Callable[[], Event] | None:
    """The event factory for this device, in a thread that uses it; None if events are not needed."""
    if device.type != "cuda":
        return None

    return lambda: cast("Event", torch.cuda.Event(enable_timing=True))


def work_on(device: torch.device) -> None:
    """Make `device` this thread's default: for events, generated kernels and pinned memory."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
