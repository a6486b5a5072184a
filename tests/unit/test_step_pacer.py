"""The host stays close to its device, and costs are the device's own times."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from calotype_worker.engine import Engine
from calotype_worker.engine import engine as engine_module
from calotype_worker.engine.step_pacer import StepPacer, events_of, work_on
from tests.unit.test_engine import request


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
    """After each order all steps but the last are done, and each has reported its own group's cost."""
    device = Device()
    pace: StepPacer[str] = StepPacer(device.event)
    for number in range(5):

        def order() -> int:
            device.ordered += 1
            return device.ordered

        assert pace.step(f"group {number}", order) == number + 1
        assert device.clock == 10.0 * number
        assert pace.cost(f"group {number}") == 0.0, "not known yet"
    assert [pace.cost(f"group {number}") for number in range(4)] == pytest.approx([0.01] * 4)


def test_a_cpu_is_done_when_the_call_returns() -> None:
    """No events; the time of the call is the step's, and known at once."""
    assert events_of(torch.device("cpu")) is None
    pace: StepPacer[str] = StepPacer(None)
    assert pace.step("group", lambda: "report") == "report"
    assert 0 < pace.cost("group") < 1


def test_the_engines_thread_works_on_its_own_device(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are marked in the stream of a thread's device, which is the first one unless another one is given."""
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        work_on(torch.device(name))
    assert chosen == [torch.device("cuda:1")]
    reported: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        engine_module, "work_on", lambda device: reported.append((threading.current_thread().name, device))
    )
    engine: Engine = make_engine()
    assert engine.submit(request("any")).result(120).image.any()
    assert reported == [("calotype-engine", torch.device("cpu"))]


def test_a_cost_is_the_least_of_the_last_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stalled step changes nothing; eight slower ones do. Groups that have not run for long are forgotten."""
    clock = 0.0
    monkeypatch.setattr("calotype_worker.engine.step_pacer.time.monotonic", lambda: clock)
    pace: StepPacer[str] = StepPacer(None)

    def step(group: str, seconds: float) -> None:
        def order() -> None:
            nonlocal clock
            clock += seconds

        pace.step(group, order)

    step("group", 1.0)
    step("group", 5.0)
    assert pace.cost("group") == pytest.approx(1.0)
    for _ in range(7):
        step("group", 2.0)
    assert pace.cost("group") == pytest.approx(2.0)
    for number in range(128):
        step(f"group {number}", 3.0)
    assert pace.cost("group") == 0.0
    assert pace.cost("group 127") == pytest.approx(3.0)
