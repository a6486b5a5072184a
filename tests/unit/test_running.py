"""What an engine reports of its step batches while they run."""

from __future__ import annotations

from typing import Any

from calotype_worker.engine.request_state import RequestState
from calotype_worker.engine.running import running_groups
from calotype_worker.request import GroupKey
from tests.integration.conftest import until
from tests.unit.test_engine import request


def test_the_rows_of_this_moment(make_engine: Any) -> None:
    """Every request once: in its group's batch with its steps, or waiting for a place; none when all are done."""
    engine = make_engine(max_rows=4)
    assert engine.running() == ()
    long: dict[str, Any] = {"steps": 900, "prompt": "x"}
    futures = [engine.submit(request(f"guided{n}/1-abcd/{n}", **long)) for n in range(3)]
    futures += [engine.submit(request("small", guidance=1.0, width=32, height=32, **long))]
    until(lambda: [row.step > 1 for group in engine.running() for row in group.rows] == [True] * 3)
    large, small = sorted(engine.running(), key=lambda group: -group.width)
    assert (large.width, large.height, large.budget) == (64, 64, 4)
    assert (large.running, large.waiting, large.decoding) == (2, 1, 0)
    assert [(row.job, row.image, row.total_steps, row.guided) for row in large.rows] == [
        ("guided0", 0, 900, True),
        ("guided1", 1, 900, True),
    ]
    assert [(row.job, row.image, row.guided) for row in small.rows] == [("small", 0, False)]
    before = large.rows[0].step
    until(lambda: any(row.step > before for group in engine.running() for row in group.rows))
    for future in futures:
        future.cancel()
    assert engine.cancel("small")  # wakes it
    until(lambda: engine.running() == ())


def test_a_report_is_bounded() -> None:
    """The busiest groups, their first rows; the numbers still count all. The fence token stays in the worker."""

    def states(model: str, running: int, *, waiting: int = 0, decoding: int = 0) -> list[RequestState]:
        key = GroupKey(model=model, latent_shape=(4, 8, 8))
        made = []
        for n in range(running + waiting + decoding):
            one = request(f"job{n}/2-abcd/3", prompt="x")
            state = RequestState(request=one, group=key, rows=1, stages=[], total_steps=50, steps_before=n)
            state.admitted = 1.0 if n < running else 0.0
            state.denoised = 2.0 if n >= running + waiting else 0.0
            made.append(state)
        return made

    small = [state for n in range(20) for state in states(f"n{n}", 20)]
    found = running_groups(small + states("m", 50, waiting=5, decoding=1), {}, lambda _: 99)
    assert len(found) == 8
    shown = [(group.model, group.running, len(group.rows)) for group in found]
    assert shown[:3] == [("m", 50, 50), ("n0", 20, 14), ("n1", 20, 0)]
    assert (found[0].waiting, found[0].decoding, found[0].budget) == (5, 1, 99)
    row = found[0].rows[7]
    assert (row.job, row.image, row.step, row.total_steps, row.guided) == ("job7", 3, 7, 50, False)
    assert "abcd" not in found[0].model_dump_json()
