"""What an engine says of its step batches while they run."""

from __future__ import annotations

from typing import Any

from calotype_worker.engine.running import RunningGroup, RunningRow
from calotype_worker.observability.report import step_groups
from tests.integration.conftest import until
from tests.unit.test_engine import request


def test_the_rows_of_this_moment(make_engine: Any) -> None:
    """Every request once: in its group's batch with its steps, or waiting for a place; none when all are done."""
    engine = make_engine(max_rows=4)
    assert engine.running() == []
    long = {"steps": 900, "prompt": "x"}
    futures = [engine.submit(request(f"guided {n}", **long)) for n in range(3)]
    futures += [engine.submit(request("small", guidance=1.0, width=32, height=32, **long))]
    until(lambda: [row.step > 1 for group in engine.running() for row in group.rows] == [True] * 3)
    large, small = sorted(engine.running(), key=lambda group: -group.width)
    assert (large.width, large.height, large.budget, large.waiting, large.decoding) == (64, 64, 4, 1, 0)
    assert [(row.request_id, row.total_steps, row.guided) for row in large.rows] == [
        ("guided 0", 900, True),
        ("guided 1", 900, True),
    ]
    assert [(row.request_id, row.guided) for row in small.rows] == [("small", False)]
    before = large.rows[0].step
    until(lambda: any(row.step > before for group in engine.running() for row in group.rows))
    for future in futures:
        future.cancel()
    assert engine.cancel("small")  # wakes it
    until(lambda: engine.running() == [])


def test_a_report_is_bounded() -> None:
    """The busiest groups, their first rows; the numbers still count all. An engine's name of an image has parts."""
    rows = tuple(
        RunningRow(request_id=f"job{n}/2-abcd/3", step=n, total_steps=50, guided=n % 2 == 0) for n in range(50)
    )
    group = RunningGroup(model="m", width=64, height=64, budget=99, rows=rows, waiting=5, decoding=1)
    small = RunningGroup(model="n", width=64, height=64, budget=99, rows=rows[:20], waiting=0, decoding=0)
    told = step_groups([small] * 20 + [group])
    assert len(told) == 8
    assert [(one.model, one.running, len(one.rows)) for one in told[:3]] == [("m", 50, 50), ("n", 20, 14), ("n", 20, 0)]
    assert (told[0].waiting, told[0].decoding, told[0].budget) == (5, 1, 99)
    row = told[0].rows[7]
    assert (row.job, row.image, row.step, row.total_steps, row.guided) == ("job7", 3, 7, 50, False)
    assert "abcd" not in told[0].model_dump_json(), "the fence token stays in the worker"
