"""The engine's scheduler: who runs next. Stateful property tests against a plain model of what it promises."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from calotype_worker.engine.scheduler import Scheduler

BUDGETS = {"small": 8, "large": 3, "tiny": 2}


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, removes and plans in any order, beside a model that keeps a list of ids a group."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler[str] = Scheduler(BUDGETS.__getitem__)
        self.rows: dict[str, int] = {}
        self.group: dict[str, str] = {}
        self.order: dict[str, list[str]] = {group: [] for group in BUDGETS}  # arrival order of those not yet admitted
        self.admitted: list[str] = []
        self.since_served: dict[str, int] = {}  # plans for other groups since a group with work was served
        self.count = 0

    @rule(group=st.sampled_from(sorted(BUDGETS)), rows=st.integers(1, 2))
    def add(self, group: str, rows: int) -> None:
        self.count += 1
        request = f"r{self.count}"
        self.scheduler.add(request, group, rows)
        self.rows[request], self.group[request] = rows, group
        self.order[group].append(request)
        self.since_served.setdefault(group, 0)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.rows)))
        self.scheduler.remove(request)
        group = self.group.pop(request)
        del self.rows[request]
        if request in self.admitted:
            self.admitted.remove(request)
        else:
            self.order[group].remove(request)
        if group not in self.group.values():
            self.since_served.pop(group, None)

    @rule()
    def plan(self) -> None:
        plan = self.scheduler.plan()
        if plan is None:
            assert not self.rows, "nothing planned though there is work"
            return
        # First come, first admitted.
        assert list(plan.admitted) == self.order[plan.group][: len(plan.admitted)]
        self.order[plan.group] = self.order[plan.group][len(plan.admitted) :]
        self.admitted += plan.admitted
        # Nothing that fits is left standing.
        if self.order[plan.group]:
            head = self.order[plan.group][0]
            assert self.used(plan.group) + self.rows[head] > BUDGETS[plan.group]
        assert self.scheduler.running(plan.group), "a step with no request in it"
        # Nobody waits for more than one step of every other group.
        self.since_served = {g: n + 1 for g, n in self.since_served.items()} | {plan.group: 0}
        assert max(self.since_served.values()) < len(BUDGETS)

    def used(self, group: str) -> int:
        return sum(self.rows[r] for r in self.admitted if self.group[r] == group)

    @invariant()
    def budgets_hold(self) -> None:
        for group, budget in BUDGETS.items():
            assert self.used(group) <= budget

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler) == len(self.rows)
        assert self.scheduler.waiting() == sum(len(line) for line in self.order.values())


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_request_that_can_never_fit_is_refused() -> None:
    """It would otherwise block its group's line for ever."""
    with pytest.raises(ValueError, match="needs 4 rows"):
        Scheduler[str](BUDGETS.__getitem__).add("a", "large", 4)


def test_ids_are_unique() -> None:
    """A second request under the same id would make removal ambiguous."""
    scheduler = Scheduler[str](BUDGETS.__getitem__)
    scheduler.add("a", "small", 1)
    with pytest.raises(ValueError, match="already scheduled"):
        scheduler.add("a", "large", 1)


def test_every_request_is_finished_when_each_takes_a_few_steps() -> None:
    """A thousand requests of three groups, each done after a few of its group's steps: all get through."""
    scheduler = Scheduler[str](BUDGETS.__getitem__)
    left = {f"r{i}": 1 + i % 5 for i in range(1000)}
    for i, request in enumerate(left):
        scheduler.add(request, sorted(BUDGETS)[i % 3], 1 + i % 2)
    steps = 0
    while (plan := scheduler.plan()) is not None:
        steps += 1
        for request in scheduler.running(plan.group):
            left[request] -= 1
            if left[request] == 0:
                scheduler.remove(request)
    assert not any(left.values())
    assert steps < 3000


def test_the_scheduler_imports_no_torch() -> None:
    """It is bookkeeping: it must stay testable, and readable, without a device."""
    # The package's __init__ imports the engine; load the module by its file, as a reader would.
    code = (
        "import sys, importlib.util as u; sys.modules['torch'] = None; "
        "from pathlib import Path; import calotype_worker; "
        "p = Path(calotype_worker.__file__).parent / 'engine' / 'scheduler.py'; "
        "s = u.spec_from_file_location('scheduler', p); m = u.module_from_spec(s); sys.modules['scheduler'] = m; "
        "s.loader.exec_module(m); print(m.Scheduler.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Scheduler", done.stderr


def test_groups_that_are_not_at_hand_give_way_for_a_while() -> None:
    """Two models that do not fit together are not exchanged at every step, and neither starves."""
    at_hand = {"a"}
    scheduler: Scheduler[str] = Scheduler(lambda _: 8, at_hand=lambda group: group in at_hand, patience=5)
    for group in ("b", "a"):
        scheduler.add(f"one of {group}", group, 1)
    turns = []
    for _ in range(14):
        plan = scheduler.plan()
        assert plan is not None
        at_hand = {plan.group}
        turns.append(plan.group)
    assert "".join(turns) == "aaaaabbbbbbaaa"
    scheduler.remove("one of a")
    scheduler.remove("one of b")
    scheduler.add("one of c", "c", 1)
    assert scheduler.plan() is not None, "with nobody at hand the first in line runs"
    scheduler.check_integrity()
