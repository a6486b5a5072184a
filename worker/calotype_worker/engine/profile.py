"""`profile`: how long a step takes over its number of rows, and the knee beyond which more rows bring nothing.

Up to the knee a row more is nearly free, for the device waits for memory and kernel launches; beyond it a step takes
longer in proportion, so that images only wait for each other. The knee depends on model, size and device, so it is
measured.

A worker keeps its knee for life, and may start on a machine that is busy with other things. What disturbs a measurement
only makes it longer, so the least of several is taken; and what more rows were done in, fewer could have been. Short
steps slip through between the others' turns where long ones do not: on a processor that is shared, a throughput that
falls with more rows says only that it was busy. Then no knee is believed: too many rows cost some latency, too few
most of the throughput.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from calotype_worker.engine.memory_limit import free_failed_pass, is_out_of_memory

_TOLERANCE = 0.05  # of the best throughput: what is given up for shorter steps
_STEPS = 5  # timed of each size, where there is time for them
_LEAST_STEPS = 3  # timed of each size in any case, and one before that
_FALL = 0.75  # of the best throughput: with less at the most rows, the processor was busy with other things
_LONGEST = 3.0  # seconds of one step: no larger batch is tried then


@dataclass(frozen=True, kw_only=True)
class Point:
    rows: int
    seconds: float  # of one step; the least that was seen

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Of one model and size on one device."""

    model: str
    width: int  # pixels
    height: int
    points: tuple[Point, ...]  # by rows
    shared: bool = False  # with other processes, as a CPU is

    @property
    def disturbed(self) -> bool:
        """Whether others were at work, so that the figures say nothing about how rows compare."""
        return self.shared and self.points[-1].rate < _FALL * max(point.rate for point in self.points)

    @property
    def knee(self) -> Point:
        """The fewest rows that come within 5% of the best throughput; the most that were tried if it was disturbed."""
        if self.disturbed:
            return self.points[-1]
        best = max(point.rate for point in self.points)
        return next(point for point in self.points if point.rate >= (1 - _TOLERANCE) * best)


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Numbers of rows to try: 1, 2, 3, 4, 6, 8, 12, … and `most`."""
    found = {rows for power in range(most.bit_length()) for rows in (1 << power, 3 << power >> 1) if rows <= most}
    return tuple(sorted(found | {most}))


def measure(
    sizes: Sequence[int], make_step: Callable[[int], Callable[[], object]], *, seconds: float, device: torch.device
) -> tuple[Point, ...]:
    """Time `make_step(rows)()` for each size, in interleaved rounds for about `seconds`.

    Every size is tried, however busy the machine, or a slow start would be taken for a small knee; only where the
    device is out of memory or a step takes seconds does it stop growing. There is always a first point.

    Raises:
        Exception: what the smallest step raises.
    """

    def timed(step: Callable[[], object]) -> float:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    ends = time.perf_counter() + seconds
    steps: dict[int, Callable[[], object]] = {}
    least: dict[int, float] = {}
    for rows in sizes:
        try:
            step = make_step(rows)
            timed(step)  # kernels are chosen and compiled here
            took = min(timed(step) for _ in range(_LEAST_STEPS - 1))
        except Exception as error:
            if not steps or not is_out_of_memory(error):
                raise
            free_failed_pass(error)
            break
        steps[rows], least[rows] = step, took
        if took > _LONGEST:
            break
    for number in range(_LEAST_STEPS - 1, _STEPS):  # interleaved: a busy moment of the machine hits all sizes
        for rows, step in steps.items():
            if number < _LEAST_STEPS or time.perf_counter() < ends:
                least[rows] = min(least[rows], timed(step))
    return tuple(
        Point(rows=rows, seconds=min(found for size, found in least.items() if size >= rows)) for rows in least
    )
