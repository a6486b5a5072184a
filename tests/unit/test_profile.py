"""The start-up profile: where its knee is, what stops it, and that the engine keeps to it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calotype_shared.errors import GenerationFailed, InvalidRequest
from calotype_worker import profiling
from calotype_worker.engine import Engine, GenerationRequest, profiler
from calotype_worker.engine import profile as module
from calotype_worker.engine.profile import Point, Profile, measure, sizes_up_to
from calotype_worker.models.base import StepModel
from calotype_worker.request import GroupKey
from calotype_worker.settings import WorkerSettings
from tests.unit.test_engine import request

CPU = torch.device("cpu")


def profile(times: dict[int, float]) -> Profile:
    points = tuple(Point(rows=rows, seconds=seconds) for rows, seconds in times.items())
    return Profile(model="m", width=64, height=64, points=points)


@pytest.mark.parametrize(
    ("times", "knee"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, 8),  # a row is free: all of them
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 1),  # a row costs a row: they would only wait for each other
        ({1: 1.0, 2: 1.1, 4: 2.0, 8: 3.9, 16: 7.8}, 4),  # 4 rows make 2.0 a second, 8 and 16 make 2.05
        ({1: 1.0}, 1),
    ],
)
def test_the_knee_is_the_fewest_rows_that_come_near_the_best(times: dict[int, float], knee: int) -> None:
    """Within 5% of the best throughput."""
    assert profile(times).knee.rows == knee


def test_a_busy_processor_is_not_taken_for_a_small_knee() -> None:
    """Long steps suffer more from other processes than short ones; on a device of one's own a fall is real."""
    times = {1: 0.02, 2: 0.05, 4: 0.12, 8: 0.3, 16: 0.7}
    assert profile(times).knee.rows == 1
    busy = replace(profile(times), shared=True)
    assert busy.disturbed
    assert busy.knee.rows == 16
    quiet = replace(profile({1: 0.02, 2: 0.02, 4: 0.03, 8: 0.06, 16: 0.14}), shared=True)
    assert not quiet.disturbed
    assert quiet.knee.rows == 4


def test_sizes_grow_by_halves_of_a_doubling() -> None:
    """Up to the most, which is always tried itself."""
    assert sizes_up_to(20) == (1, 2, 3, 4, 6, 8, 12, 16, 20)
    assert sizes_up_to(2) == (1, 2)


class Clock:
    """Time as the steps of a test let it pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self._now))

    def step(self, seconds: Callable[[], float]) -> Callable[[], object]:
        def run() -> None:
            self._now += seconds()

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_measure_times_each_size(clock: Clock) -> None:
    """The least of all, so that slow rounds are nothing."""
    slow = iter([False, False, True, True, True] + [False] * 40)

    def make_step(rows: int) -> Callable[[], object]:
        return clock.step(lambda: 0.004 * rows + (0.1 if rows == 2 and next(slow) else 0.0))

    points = measure([1, 2, 4], make_step, seconds=5, device=CPU)
    assert [point.rows for point in points] == [1, 2, 4]
    assert [point.seconds for point in points] == pytest.approx([0.004, 0.008, 0.016])


def test_a_busy_machine_does_not_make_the_knee_small(clock: Clock) -> None:
    """Every size is tried, even where the time for it is over."""
    points = measure([1, 2, 4, 8], lambda rows: clock.step(lambda: 0.02), seconds=0.01, device=CPU)
    assert [point.rows for point in points] == [1, 2, 4, 8]


def test_fewer_rows_take_no_longer_than_more(clock: Clock) -> None:
    """A size that was only ever timed while the machine was busy has the time of the next larger one."""

    def make_step(rows: int) -> Callable[[], object]:
        return clock.step(lambda: 0.1 if rows in (1, 4) else 0.005 * rows)

    points = measure([1, 2, 4, 8], make_step, seconds=0.1, device=CPU)
    assert [point.seconds for point in points] == pytest.approx([0.01, 0.01, 0.04, 0.04])


def test_measure_stops_where_memory_ends() -> None:
    """The sizes that fit are what is known; any other error is one."""

    def make_step(rows: int) -> Callable[[], object]:
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    assert [point.rows for point in measure([1, 2, 4, 8], make_step, seconds=1, device=CPU)] == [1, 2]
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        measure([4], make_step, seconds=1, device=CPU)

    def broken(_: int) -> Callable[[], object]:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        measure([1], broken, seconds=1, device=CPU)


def test_the_engine_keeps_to_the_knee(make_engine: Any, tiny_step_model: StepModel, monkeypatch: Any) -> None:
    """Of the size itself, and by area of the nearest one for others; never above what was configured."""
    tried: list[Sequence[int]] = []

    def known(sizes: Sequence[int], make_step: Callable[[int], Callable[[], object]], **_: Any) -> tuple[Point, ...]:
        tried.append(sizes)
        make_step(2)()  # a real step
        return (Point(rows=1, seconds=1.0), Point(rows=6, seconds=1.2), Point(rows=16, seconds=3.2))

    monkeypatch.setattr(profiler, "measure", known)
    made: Engine = make_engine(tiny_step_model, max_rows=16, start=False)
    width, height = tiny_step_model.card.native_sizes[0]
    assert made.profile(seconds=1)[0].knee.rows == 6
    assert tried[0][-1] == 16

    def budget(width: int, height: int) -> int:
        shape = tiny_step_model.latent_shape(width, height)
        return made._budgets.current(GroupKey(model=tiny_step_model.card.name, latent_shape=shape))

    assert budget(width, height) == 6
    assert budget(width // 2, height // 2) == 16
    assert budget(2 * width, height) == 3
    assert budget(4 * width, 4 * height) == 2
    made.start()
    futures = [made.submit(request(f"r{number}", guidance=1.0)) for number in range(12)]
    for future in futures:
        future.result(120)
    stats = made.stats()
    assert 4 < stats.rows / stats.forward_passes <= 6  # the first pass may have begun before all were here


def test_steps_are_measured_where_they_are_run(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph belongs to the thread that recorded it. The caller gets an error, and the engine runs on."""
    threads: list[str] = []

    def fails(*_: Any, **__: Any) -> tuple[Point, ...]:
        threads.append(threading.current_thread().name)
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(profiler, "measure", fails)
    made: Engine = make_engine(start=False)
    with pytest.raises(RuntimeError, match="no kernel image"):
        made.profile(seconds=1)
    assert made.submit(request("after")).result(120).image.any()
    assert threads == ["calotype-engine"]
    with pytest.raises(GenerationFailed, match="started already"):
        made.profile(seconds=1)


def test_a_profile_of_a_lost_device_ends(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets the error whether the device fails while it is set up or while steps are measured."""

    def lost(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    for target in ("calotype_worker.engine.engine.work_on", "calotype_worker.engine.engine.profile_models"):
        with monkeypatch.context() as patch:
            patch.setattr(target, lost)
            fatal: list[BaseException] = []
            made: Engine = make_engine(start=False, on_fatal=fatal.append)
            with pytest.raises((GenerationFailed, torch.AcceleratorError), match="device-side assert"):
                made.profile(seconds=1)
            made.stop()
            assert len(fatal) == 1
            assert not made.alive


def test_a_fixed_number_of_rows_is_not_measured(make_engine: Any) -> None:
    """Deterministic images must not depend on how fast a machine is."""
    made: Engine = make_engine(deterministic=True, start=False)
    assert made.profile(seconds=1) == []


def test_the_command_shows_what_it_measured(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a number of rows, the best with the longest bar and the knee marked; deterministic mode has no knee."""
    monkeypatch.setattr(profiling, "_LEAST_SECONDS", 0.5)
    options = WorkerSettings.load(model=f"tiny={tiny_model}", max_rows=4, profile_seconds=0.0)
    profiling.print_profiles(options)
    shown = capsys.readouterr().out
    assert "tiny 64x64 on cpu" in shown
    rows = re.findall(r"^[│ ]*(\d+)[│ ]+([\d.]+)[│ ]+([\d.]+)[│ ]+(█+)", shown, re.MULTILINE)
    assert [int(row) for row, *_ in rows] == [1, 2, 3, 4]
    best = max(rows, key=lambda row: float(row[2]))
    assert len(best[3]) == max(len(bar) for *_, bar in rows) > 1
    assert shown.count("◀") == 1
    with pytest.raises(InvalidRequest, match="without --deterministic"):
        profiling.print_profiles(options.model_copy(update={"deterministic": True}))


def test_a_real_profile_is_of_every_native_size(make_engine: Any, tiny_step_model: StepModel) -> None:
    """And leaves an engine that works."""
    made: Engine = make_engine(tiny_step_model, max_rows=4, start=False)
    profiles = made.profile(seconds=0.5)
    assert [(p.width, p.height) for p in profiles] == list(tiny_step_model.card.native_sizes)
    assert all(point.seconds > 0 for p in profiles for point in p.points)
    made.start()
    wanted: GenerationRequest = request("after")
    assert made.submit(wanted).result(120).image.any()
