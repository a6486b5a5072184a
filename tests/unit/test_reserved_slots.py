"""Room for interactive jobs in a full worker: who waits, for what, and how often Redis is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from calotype_worker.jobs import reserved_slots as module
from calotype_worker.jobs.reserved_slots import ReservedSlots
from tests.faults.harness import until


class Line:
    """Interactive jobs in the queue, queues that have messages to spare, and how often somebody has looked or asked."""

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.looks = 0
        self.spare = {"long"}
        self.asked: list[str] = []

    def look(self) -> str | None:
        self.looks += 1
        return self.jobs.pop(0) if self.jobs else None

    def has_spare(self, queue: str) -> bool:
        self.asked.append(queue)
        return queue in self.spare


class Waiter:
    """A thread with a message for a bulk job. `got`: what it was given; it keeps that until `done`."""

    def __init__(
        self, slots: ReservedSlots, line: Line, *, queue: str = "long", stop: threading.Event | None = None
    ) -> None:
        self.got: str | bool | None = None
        self._done = threading.Event()
        self._stop = stop or threading.Event()
        self._arguments = (slots, line, queue)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        slots, line, queue = self._arguments
        with slots.bulk(queue, line.look, stopped=self._stop.is_set, spare=line.has_spare) as found:
            self.got = found
            self._done.wait(120)

    def done(self) -> None:
        self._done.set()
        self._thread.join(120)
        assert not self._thread.is_alive()


@contextmanager
def full(slots: ReservedSlots, line: Line, count: int) -> Iterator[list[Waiter]]:
    holders = [Waiter(slots, line) for _ in range(count)]
    until(lambda: all(holder.got is True for holder in holders))
    yield holders
    for holder in holders:
        holder.done()


@pytest.fixture
def line() -> Line:
    return Line()


def test_a_free_place_needs_no_look_and_one_given_up_goes_to_who_waits(line: Line) -> None:
    slots = ReservedSlots(2)
    with full(slots, line, 2) as holders:
        assert line.looks == 0
        waiter = Waiter(slots, line)
        until(lambda: line.looks == 1)
        assert waiter.got is None
        holders[0].done()
        until(lambda: waiter.got is True)
        waiter.done()


def test_an_arrival_is_looked_for_at_once_and_so_are_those_that_came_along(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only notices can do it here: looks without one are an hour apart."""
    monkeypatch.setattr(module, "_LOOK_SECONDS", 3600.0)
    slots = ReservedSlots(1)
    with full(slots, line, 1):
        waiters = [Waiter(slots, line) for _ in range(3)]
        until(lambda: line.looks == 1)  # the first to wait looks, for nobody knows what was before
        line.jobs += ["a", "b"]
        slots.interactive_arrived()
        until(lambda: sorted(str(waiter.got) for waiter in waiters) == ["None", "a", "b"])
        until(lambda: line.looks == 4)  # and once more than there were
        [last] = [waiter for waiter in waiters if waiter.got is None]
        line.jobs.append("c")
        slots.interactive_arrived()
        until(lambda: last.got == "c")
        for waiter in waiters:
            waiter.done()


def test_a_notice_that_was_missed_costs_a_second(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.3)
    slots = ReservedSlots(1)
    with full(slots, line, 1):
        waiter = Waiter(slots, line)
        line.jobs.append("a")
        until(lambda: waiter.got == "a")
        waiter.done()


def test_the_last_message_is_given_back_and_others_are_kept(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HOLD_SECONDS", 0.1)
    monkeypatch.setattr(module, "_TURN_SECONDS", 0.02)
    slots = ReservedSlots(1)
    with full(slots, line, 1) as holders:
        bulk, last = Waiter(slots, line), Waiter(slots, line, queue="short")
        until(lambda: last.got is False)
        assert bulk.got is None
        last.done()
        holders[0].done()
        until(lambda: bulk.got is True)
        bulk.done()


def test_one_question_serves_all_who_wait(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one queue, and while the answer is yes: after a no the next thread asks for itself."""
    monkeypatch.setattr(module, "_HOLD_SECONDS", 0.2)
    monkeypatch.setattr(module, "_TURN_SECONDS", 0.01)
    slots, stop = ReservedSlots(1), threading.Event()
    with full(slots, line, 1):
        began = time.monotonic()
        waiters = [Waiter(slots, line, stop=stop) for _ in range(8)]
        until(lambda: len(line.asked) == 3)
        assert time.monotonic() - began > 2 * 0.2
        line.spare.clear()
        until(lambda: all(waiter.got is False for waiter in waiters))
        assert len(line.asked) >= 3 + len(waiters)
        for waiter in waiters:
            waiter.done()


def test_who_leaves_waits_for_nothing(line: Line) -> None:
    slots, stop = ReservedSlots(1), threading.Event()
    with full(slots, line, 1):
        waiter = Waiter(slots, line, stop=stop)
        until(lambda: line.looks == 1)
        stop.set()
        until(lambda: waiter.got is False)
        waiter.done()
