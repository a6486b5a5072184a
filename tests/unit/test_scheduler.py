"""The engine's scheduler: who runs next. Stateful property tests against a plain model of what it promises."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
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
    resident = {"a"}
    scheduler: Scheduler[str] = Scheduler(lambda _: 8, resident=lambda group: group in resident, switch_delay_steps=5)
    for group in ("b", "a"):
        scheduler.add(f"one of {group}", group, 1)
    turns = []
    for _ in range(14):
        plan = scheduler.plan()
        assert plan is not None
        resident = {plan.group}
        turns.append(plan.group)
    assert "".join(turns) == "aaaaabbbbbbaaa"
    scheduler.remove("one of a")
    scheduler.remove("one of b")
    scheduler.add("one of c", "c", 1)
    assert scheduler.plan() is not None, "with nobody at hand the first in line runs"
    scheduler.check_integrity()


def test_interactive_requests_join_first() -> None:
    """Before all that wait, in their own order; and a large one is not passed by small bulk ones."""
    scheduler = Scheduler[str](lambda _: 2)
    for request in ("running", "a", "b"):
        scheduler.add(request, "group", 1 if request == "running" else 2)
    assert scheduler.plan().admitted == ("running",)  # type: ignore[union-attr]
    scheduler.add("late", "group", 1)
    scheduler.add("interactive", "group", 2, interactive=True)
    scheduler.add("interactive too", "group", 1, interactive=True)
    assert scheduler.plan().admitted == ()  # type: ignore[union-attr]
    scheduler.remove("running")
    order: list[str] = []
    while scheduler.waiting():
        admitted = scheduler.plan().admitted  # type: ignore[union-attr]
        order += admitted
        scheduler.check_integrity()
        for request in admitted:
            scheduler.remove(request)
    assert order == ["interactive", "interactive too", "a", "b", "late"]
    scheduler.add("x", "group", 1, interactive=True)
    scheduler.remove("x")
    assert len(scheduler) == 0


def test_a_budget_may_change_between_steps() -> None:
    """Who runs stays; who waits is admitted by the new one."""
    budget = {"g": 6}
    scheduler: Scheduler[str] = Scheduler(budget.__getitem__)
    for number in range(5):
        scheduler.add(f"r{number}", "g", 2)
    assert scheduler.plan().admitted == ("r0", "r1", "r2")  # type: ignore[union-attr]
    budget["g"] = 4
    assert scheduler.plan().admitted == ()  # type: ignore[union-attr]
    scheduler.check_integrity()
    scheduler.remove("r0")
    assert scheduler.plan().admitted == ()  # type: ignore[union-attr]
    scheduler.remove("r1")
    assert scheduler.plan().admitted == ("r3",)  # type: ignore[union-attr]
    scheduler.check_integrity()
    budget["g"] = 6
    assert scheduler.plan().admitted == ("r4",)  # type: ignore[union-attr]
    scheduler.check_integrity()


def turns(scheduler: Scheduler[str], count: int) -> list[str]:
    plans = [scheduler.plan() for _ in range(count)]
    return [plan.group for plan in plans if plan is not None]


def test_groups_share_time_and_not_steps() -> None:
    """Four steps of small images take as long as one of large ones, and so they run for each of these."""
    scheduler: Scheduler[str] = Scheduler(lambda _: 8, step_cost={"small": 0.25, "large": 1.0}.__getitem__)
    for group in ("small", "large"):
        scheduler.add(f"one of {group}", group, 1)
    assert turns(scheduler, 10) == ["small"] * 4 + ["large"] + ["small"] * 4 + ["large"]


@given(
    costs=st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 2.0), min_size=2),
    changes=st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0.001, 2.0)), max_size=20),
)
def test_nobody_waits_longer_than_promised(costs: dict[str, float], changes: list[tuple[str, float]]) -> None:
    """Whatever steps cost, and however that changes: twice the dearest step for each other group."""
    scheduler: Scheduler[str] = Scheduler(lambda _: 8, step_cost=lambda group: costs[group])
    for group in costs:
        scheduler.add(f"one of {group}", group, 1)
    dearest = max([*costs.values(), *(cost for _, cost in changes)])
    waited = dict.fromkeys(costs, 0.0)
    served = dict.fromkeys(costs, 0.0)
    for number in range(400):
        if number % 10 == 0 and changes:
            group, cost = changes[number // 10 % len(changes)]
            costs |= {group: cost} if group in costs else {}
        (group,) = turns(scheduler, 1)
        served[group] += costs[group]
        waited = {other: 0.0 if other == group else seconds + costs[group] for other, seconds in waited.items()}
        assert max(waited.values()) <= 2 * dearest * (len(costs) - 1) + 1e-6
    if not changes:
        assert max(served.values()) - min(served.values()) <= 2 * dearest, "shares of time are not equal"


def test_a_stall_of_the_machine_does_not_give_a_group_the_device() -> None:
    """A round that began while a step was dear ends when steps are cheap again."""
    costs = {"a": 10.0, "b": 10.0}
    scheduler: Scheduler[str] = Scheduler(lambda _: 8, step_cost=costs.__getitem__)
    for group in costs:
        scheduler.add(f"one of {group}", group, 1)
    assert turns(scheduler, 1) == ["a"]
    costs |= {"a": 0.01, "b": 0.01}
    assert "a" in turns(scheduler, 3)
    assert "b" in turns(scheduler, 3)


def test_groups_with_urgent_requests_go_first_and_the_others_are_not_forgotten() -> None:
    """Eight steps of theirs, then one of the others'; as soon as no interactive one runs, all take turns again."""
    scheduler: Scheduler[str] = Scheduler(lambda _: 2)
    scheduler.add("bulk", "a", 1)
    scheduler.add("interactive", "b", 1, interactive=True)
    scheduler.add("neighbour", "b", 1)
    plan = scheduler.plan()
    assert plan is not None
    assert (plan.group, plan.reason) == ("b", "interactive")
    assert turns(scheduler, 17) == [*"bbbbbbb", "a", *"bbbbbbbb", "a"]
    scheduler.check_integrity()
    scheduler.remove("interactive")
    assert sorted(turns(scheduler, 4)) == [*"aabb"]
