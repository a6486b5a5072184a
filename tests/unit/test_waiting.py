"""The state of a wait, driven by hand: no server, no clock."""

from __future__ import annotations

import pytest

from calotype.waiting import Waiting
from calotype_shared.errors import JobNotFound
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.schema.resolve import ResolvedConfig

_CONFIG = ResolvedConfig(prompt="x", width=64, height=64, seed=1)


def record(job_id: str, state: JobState = JobState.QUEUED, step: int = 0) -> JobRecord:
    return JobRecord(
        id=job_id,
        state=state,
        lane=Lane.BULK,
        config=_CONFIG,
        digest="",
        created_at=0.0,
        queued_at=0.0,
        step=step,
        total_steps=10,
    )


def test_only_changes_are_told() -> None:
    """The first look tells everything, the next only what moved, and a final job is not looked at again."""
    waiting = Waiting(["a", "b"], started=0.0, timeout=None)
    assert waiting.update(["a", "b"], [record("a"), record("b")]) == [record("a"), record("b")]
    assert waiting.update(["a", "b"], [record("a"), record("b", JobState.RUNNING)]) == [record("b", JobState.RUNNING)]
    assert waiting.update(["a", "b"], [record("a", JobState.CANCELLED), record("b", JobState.RUNNING)]) == [
        record("a", JobState.CANCELLED)
    ]
    assert waiting.window == ["b"]
    waiting.update(["b"], [record("b", JobState.SUCCEEDED)])
    assert waiting.done


@pytest.mark.parametrize(
    ("waited", "pause"), [(0.0, 0.01), (0.1, 0.01), (2.0, 0.1), (10.0, 0.5), (20.0, 1.0), (9e3, 1.0)]
)
def test_an_end_is_noticed_late_by_a_twentieth_of_the_wait(waited: float, pause: float) -> None:
    """By a hundredth of a second at least, and by a second at most."""
    waiting = Waiting(["a"], started=5.0, timeout=None)
    waiting.update(["a"], [record("a")])
    assert waiting.pause(5.0 + waited) == pytest.approx(pause)


def test_waits_for_many_jobs_look_less_often() -> None:
    """About two hundred records a second, however many are waited for; and oftener as they become fewer."""
    ids = [f"job-{number}" for number in range(100)]
    waiting = Waiting(ids, started=0.0, timeout=None)
    waiting.update(ids, [record(job_id) for job_id in ids])
    assert waiting.pause(0.0) == pytest.approx(0.5)
    ended = [record(job_id, JobState.SUCCEEDED) for job_id in ids[:90]]
    waiting.update(ids, [*ended, *(record(job_id) for job_id in ids[90:])])
    assert waiting.pause(0.0) == pytest.approx(0.05)
    assert Waiting([*ids, *(f"{job_id}-b" for job_id in ids * 9)], started=0.0, timeout=None).pause(0.0) == 1.0


def test_who_hears_of_changes_looks_once_a_second() -> None:
    """Whatever was waited for; and after a notice not sooner than waits for so many may look."""
    waiting = Waiting(["a", "b"], started=0.0, timeout=None)
    waiting.update(["a", "b"], [record("a"), record("b")])
    assert waiting.pause(0.0, live=True) == 1.0
    assert waiting.pause(99.0, live=True) == 1.0
    assert waiting.min_interval == pytest.approx(0.01)
    assert Waiting(["a"], started=0.0, timeout=0.5).pause(0.1, live=True) == pytest.approx(0.4)
    assert Waiting([str(number) for number in range(40)], started=0.0, timeout=None).min_interval == pytest.approx(0.2)


def test_changes_of_few_jobs_are_worth_hearing_of() -> None:
    """Of the last 64 of a wait: with more, looks are so rare that a notice gains little, and notices come thick."""
    ids = [str(number) for number in range(65)]
    waiting = Waiting(ids, started=0.0, timeout=None)
    assert waiting.subscribed_ids == []
    waiting.update(ids[:1], [record(ids[0], JobState.SUCCEEDED)])
    assert waiting.subscribed_ids == ids[1:]


def test_a_pause_ends_with_the_time_out() -> None:
    """The last sleep is cut short, and only an unfinished wait expires."""
    waiting = Waiting(["a"], started=10.0, timeout=5.0)
    assert waiting.pause(14.9) == pytest.approx(0.1)
    assert waiting.pause(99.0) == 0.0
    assert not waiting.expired(14.9)
    assert waiting.expired(15.0)
    waiting.update(["a"], [record("a", JobState.SUCCEEDED)])
    assert not waiting.expired(15.0)


def test_many_jobs_are_looked_at_in_windows() -> None:
    """One look takes 500 at most, oldest first; the rest follow as those finish."""
    ids = [str(number) for number in range(1200)]
    waiting = Waiting(ids, started=0.0, timeout=None)
    assert waiting.window == ids[:500]
    waiting.update(waiting.window, [record(job_id, JobState.SUCCEEDED) for job_id in waiting.window])
    assert waiting.window == ids[500:1000]
    assert waiting.pause(99.0) == 0.0, "those may have ended just as well"


def test_a_job_without_a_record_is_told_at_once() -> None:
    """It is named; it is never waited for in vain."""
    waiting = Waiting(["a", "lost"], started=0.0, timeout=None)
    with pytest.raises(JobNotFound, match="'lost'"):
        waiting.update(["a", "lost"], [record("a"), None])
