"""`Scheduler`: which group of requests runs the next step, and who joins it. Pure bookkeeping; imports no torch.

Invariants: no request joins a group if the running rows would then exceed the group's budget, which may change
between steps; requests of a group are admitted in the order of arrival, interactive ones before the others. Groups
share the device's time by deficit round robin (Shreedhar & Varghese 1995): in each round every group gets as much time
as the most expensive step takes, so groups of small images run several steps while one of large images runs one;
unused time is kept for the next round. Groups with interactive requests run first, except at every ninth step. So the
wait of a group with anything to run is bounded: for each other group at most twice the most expensive step; if those
have interactive requests, eight of their steps before each of its own; and, if its model is not on the device, another
`switch_delay_steps` steps.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Key = TypeVar("Key", bound=Hashable)


# Why a group was chosen: it has interactive requests; its model is on the device while that of the first group in the
# queue is not; or it was its turn.
Reason = Literal["interactive", "resident", "turn"]

_INTERACTIVE_STREAK = 8  # steps of groups with interactive requests while others wait
_LEAST_COST = 1e-6  # seconds


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[Key]):
    """One step: run `group`, after admitting `admitted` (in order) to it."""

    group: Key
    admitted: tuple[str, ...]
    reason: Reason = "turn"


@dataclass(kw_only=True)
class _Group:
    budget: int  # rows
    allowed: int = 0  # rows that may be running: more than the budget only where that was larger before
    used: int = 0  # rows of the running requests
    interactive: deque[str] = field(default_factory=deque)
    bulk: deque[str] = field(default_factory=deque)
    running: dict[str, None] = field(default_factory=dict)  # an ordered set
    urgent_running: set[str] = field(default_factory=set)
    passed_over: int = 0  # turns it gave to groups whose model is on the device
    credit: float | None = None  # seconds of the device it may still use in this round; None: the round has yet to come
    kept: float = 0.0  # seconds from the round before

    @property
    def is_urgent(self) -> bool:
        return bool(self.interactive or self.urgent_running)

    @property
    def line(self) -> deque[str]:
        """Whose turn it is to be admitted: bulk requests only where no interactive one waits."""
        return self.interactive or self.bulk


class Scheduler(Generic[Key]):
    """Owned by the engine's thread. `row_budget(group)` says how many rows may run together in a group; at least two.

    It is called before each step, so that budgets may change with what is learned about the device. So is
    `step_cost(group)`, the seconds that a group's next step will take.

    `resident(group)` says whether the group could run immediately. Groups that could not wait for up to
    `switch_delay_steps` steps.
    """

    def __init__(
        self,
        row_budget: Callable[[Key], int],
        *,
        step_cost: Callable[[Key], float] = lambda _: 1.0,
        resident: Callable[[Key], bool] = lambda _: True,
        switch_delay_steps: int = 0,
    ) -> None:
        self._row_budget = row_budget
        self._step_cost = step_cost
        self._resident = resident
        self._switch_delay_steps = switch_delay_steps
        self._groups: OrderedDict[Key, _Group] = OrderedDict()  # first: whose turn it is
        self._streak = 0  # steps that groups with interactive requests have had while others waited
        self._place: dict[str, tuple[Key, int]] = {}  # request -> its group and rows

    def __len__(self) -> int:
        """Requests waiting or running."""
        return len(self._place)

    def has(self, request_id: str) -> bool:
        """Whether a request is waiting or running here."""
        return request_id in self._place

    def add(self, request_id: str, group: Key, rows: int, *, interactive: bool = False) -> None:
        """Append a request to its group's queue of interactive or of other requests.

        Raises:
            ValueError: the id already exists, or the request could never fit its group's budget.
        """
        if request_id in self._place:
            raise ValueError(f"request {request_id!r} is already scheduled; ids must be unique")
        budget = self._row_budget(group)
        if rows > budget:
            raise ValueError(f"request {request_id!r} needs {rows} rows but its group's budget is {budget}")
        found = self._groups.setdefault(group, _Group(budget=budget, allowed=budget))
        (found.interactive if interactive else found.bulk).append(request_id)
        self._place[request_id] = (group, rows)

    def remove(self, request_id: str) -> None:
        """Forget a request that finished, failed or was cancelled. Its rows are free for the next plan."""
        group_key, rows = self._place.pop(request_id)
        group = self._groups[group_key]
        if request_id in group.running:
            del group.running[request_id]
            group.urgent_running.discard(request_id)
            group.used -= rows
        else:
            (group.interactive if request_id in group.interactive else group.bulk).remove(request_id)
        if not group.running and not group.line:
            del self._groups[group_key]

    def plan(self) -> Plan[Key] | None:
        """The next step, or None when there is nothing to run."""
        if not self._groups:
            return None
        key, reason = self._next()
        group = self._groups[key]
        group.passed_over = 0
        group.budget = self._row_budget(key)
        group.allowed = max(group.budget, group.used)
        admitted = []
        # Strictly in order: letting a one-row request past a two-row one could keep the latter out for ever.
        while group.line and group.used + self._place[group.line[0]][1] <= group.budget:
            if group.interactive:
                group.urgent_running.add(group.interactive[0])
            request_id = group.line.popleft()
            group.running[request_id] = None
            group.used += self._place[request_id][1]
            admitted.append(request_id)
        return Plan(group=key, admitted=tuple(admitted), reason=reason)

    def _next(self) -> tuple[Key, Reason]:
        """The group to run, paid for, and why."""
        interactive = [key for key, group in self._groups.items() if group.is_urgent]
        others = [key for key, group in self._groups.items() if not group.is_urgent]
        first_urgent = bool(interactive) and (not others or self._streak < _INTERACTIVE_STREAK)
        self._streak = self._streak + 1 if first_urgent and others else 0
        key = self._turn(interactive if first_urgent else others)
        group = self._groups[key]
        if not self._resident(key) and group.passed_over < self._switch_delay_steps:
            other = next((other for other in self._groups if self._resident(other)), None)
            if other is not None:
                group.passed_over += 1
                self._pay(other)
                return other, "resident"
        self._pay(key)
        return key, "interactive" if first_urgent and others else "turn"

    def _turn(self, keys: list[Key]) -> Key:
        """Which of these groups' turn it is, by deficit round robin in their order."""
        quantum = max(map(self._cost, keys))
        while True:
            key = next(key for key in self._groups if key in keys)
            group = self._groups[key]
            # Again while its round lasts: steps may have become cheaper than they were when it began.
            most = group.kept + quantum
            group.credit = most if group.credit is None else min(group.credit, most)
            if group.credit >= self._cost(key):
                return key
            # Its round is over. What is left is less than its step costs, so it cannot pile up.
            group.kept, group.credit = max(0.0, group.credit), None
            self._groups.move_to_end(key)

    def _pay(self, key: Key) -> None:
        group = self._groups[key]
        if group.credit is not None:
            group.credit -= self._cost(key)

    def _cost(self, key: Key) -> float:
        return max(_LEAST_COST, self._step_cost(key))

    def running(self, group: Key) -> tuple[str, ...]:
        """Requests admitted to a group and not yet removed, in the order of admission."""
        return tuple(self._groups[group].running) if group in self._groups else ()

    def waiting(self) -> int:
        """Requests not yet admitted, over all groups."""
        return sum(len(group.interactive) + len(group.bulk) for group in self._groups.values())

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping contradicts itself. For tests and idle moments."""
        seen = set()
        for key, group in self._groups.items():
            assert group.running or group.line, f"{key} is empty"
            assert group.used == sum(self._place[r][1] for r in group.running), f"{key} miscounts its rows"
            assert group.used <= group.allowed, f"{key} is over its budget"
            assert group.urgent_running <= set(group.running), f"{key} has interactive requests that do not run"
            for request_id in (*group.running, *group.interactive, *group.bulk):
                assert self._place[request_id][0] == key, f"{request_id} is in the wrong group"
                assert request_id not in seen, f"{request_id} is in two places"
                seen.add(request_id)
        assert seen == set(self._place), "requests without a place"
