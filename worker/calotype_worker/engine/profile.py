"""`profile`: measures how long a step takes by number of rows, and finds the knee where more rows stop helping.

Up to the knee an additional row is nearly free, because the device waits for memory and kernel launches. Beyond it, the
time of a step grows in proportion to its rows, so images only wait for each other. The knee depends on model, size and
device, so it is measured.

A worker measures its knee once, possibly on a machine that is busy with other work. Disturbances only make a
measurement longer, so the minimum of several is used; and a step never takes longer than a measured one with more rows.
On a shared processor, short steps may run undisturbed where long ones are interrupted, so a throughput that falls with
more rows only shows that the processor was busy. The measurement is then not used to reduce the rows: too many rows
cost some latency, too few cost most of the throughput.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from calotype_worker.engine.memory_limit import free_failed_pass, is_out_of_memory

_TOLERANCE = 0.05  # share of the best throughput that is given up for shorter steps
_STEPS = 5  # timed steps per size, if there is enough time
_LEAST_STEPS = 3  # timed of each size in any case, and one before that
_FALL = 0.75  # share of the best throughput: if the largest batch achieves less, the processor was busy otherwise
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
    shared: bool = False  # whether other processes use it too, like a CPU

    @property
    def disturbed(self) -> bool:
        """Whether other processes disturbed the measurement, so that sizes cannot be compared."""
        return self.shared and self.points[-1].rate < _FALL * max(point.rate for point in self.points)

    @property
    def knee(self) -> Point:
        """The fewest rows within 5% of the best throughput; the most that were measured if disturbed."""
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

    Every size is measured even on a busy machine, because stopping early would look like a small knee. Larger sizes
    are skipped only when the device runs out of memory or a step takes seconds. There is always a first point.

    Raises:
        Exception: the error of the smallest step.
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
    for number in range(_LEAST_STEPS - 1, _STEPS):  # interleaved: busy moments affect all sizes
        for rows, step in steps.items():
            if number < _LEAST_STEPS or time.perf_counter() < ends:
                least[rows] = min(least[rows], timed(step))
    return tuple(
        Point(rows=rows, seconds=min(found for size, found in least.items() if size >= rows)) for rows in least
    )
