"""The host stays close to its device, and costs are the device's own times."""

from __future__ import annotations

import pytest
import torch

from calotype_worker.engine.pace import Pace, events_of


class Device:
    """Does nothing until somebody waits for it, and takes ten milliseconds for everything then."""

    def __init__(self) -> None:
        self.ordered = 0
        self.clock = 0.0

    def event(self) -> Moment:
        return Moment(self)


class Moment:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._order = 0
        self.reached: float | None = None

    def record(self) -> None:
        self._order = self._device.ordered

    def synchronize(self) -> None:
        self.reached = self._device.clock = 10.0 * self._order

    def elapsed_time(self, end: Moment) -> float:
        assert end.reached is not None, "nobody has waited for it"
        return end.reached - 10.0 * self._order


def test_the_host_is_at_most_one_step_ahead() -> None:
    """After each order all steps but the last are done, and their times are told once, each for its own group."""
    device = Device()
    pace: Pace[str] = Pace(device.event)
    told = []
    for number in range(5):

        def order() -> int:
            device.ordered += 1
            return device.ordered

        assert pace.step(f"group {number}", order) == number + 1
        assert device.clock == 10.0 * number
        told += pace.measured()
    assert told == [(f"group {number}", pytest.approx(0.01)) for number in range(4)]
    assert pace.measured() == []


def test_a_cpu_is_done_when_the_call_returns() -> None:
    """No events; the time of the call is the step's, and it is told at once."""
    assert events_of(torch.device("cpu")) is None
    pace: Pace[str] = Pace(None)
    assert pace.step("group", lambda: "report") == "report"
    [(group, seconds)] = pace.measured()
    assert group == "group"
    assert 0 <= seconds < 1
