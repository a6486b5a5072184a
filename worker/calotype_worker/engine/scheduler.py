"""`Scheduler`: which group of requests runs the next step, and who joins it. Pure bookkeeping; imports no torch.

Always holds: the rows running in a group never exceed its budget; requests of one group are admitted in the order
they came; a group with anything to run waits for at most one step of every other group, and, if it is not at hand (its
model is not on the device), for `patience` steps more.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[Key]):
    """One step: run `group`, after admitting `admitted` (in order) to it."""

    group: Key
    admitted: tuple[str, ...]


@dataclass(kw_only=True)
class _Group:
    budget: int  # rows
    used: int = 0  # rows of the running requests
    waiting: deque[str] = field(default_factory=deque)
    running: dict[str, None] = field(default_factory=dict)  # an ordered set
    passed_over: int = 0  # turns it gave to groups at hand


class Scheduler(Generic[Key]):
    """Owned by the engine's thread. `row_budget(group)` says how many rows may run together in a group.

    `at_hand(group)` says whether it could run at once; others give way for up to `patience` turns.
    """

    def __init__(
        self,
        row_budget: Callable[[Key], int],
        *,
        at_hand: Callable[[Key], bool] = lambda _: True,
        patience: int = 0,
    ) -> None:
        self._row_budget = row_budget
        self._at_hand = at_hand
        self._patience = patience
        self._groups: OrderedDict[Key, _Group] = OrderedDict()  # first: waited longest for a step
        self._place: dict[str, tuple[Key, int]] = {}  # request -> its group and rows

    def __len__(self) -> int:
        """Requests waiting or running."""
        return len(self._place)

    def has(self, request_id: str) -> bool:
        """Whether a request is waiting or running here."""
        return request_id in self._place

    def add(self, request_id: str, group: Key, rows: int) -> None:
        """Put a request at the end of its group's line.

        Raises:
            ValueError: the id is already here, or the request could never fit its group's budget.
        """
        if request_id in self._place:
            raise ValueError(f"request {request_id!r} is already scheduled; ids must be unique")
        budget = self._row_budget(group)
        if rows > budget:
            raise ValueError(f"request {request_id!r} needs {rows} rows but its group's budget is {budget}")
        self._groups.setdefault(group, _Group(budget=budget)).waiting.append(request_id)
        self._place[request_id] = (group, rows)

    def remove(self, request_id: str) -> None:
        """Forget a request that finished, failed or was cancelled. Its rows are free for the next plan."""
        group_key, rows = self._place.pop(request_id)
        group = self._groups[group_key]
        if request_id in group.running:
            del group.running[request_id]
            group.used -= rows
        else:
            group.waiting.remove(request_id)
        if not group.running and not group.waiting:
            del self._groups[group_key]

    def plan(self) -> Plan[Key] | None:
        """The next step, or None when there is nothing to run. Groups take turns."""
        if not self._groups:
            return None
        key = self._next()
        group = self._groups[key]
        group.passed_over = 0
        self._groups.move_to_end(key)
        admitted = []
        # Strictly in order: letting a one-row request past a two-row one could keep the latter out for ever.
        while group.waiting and group.used + self._place[group.waiting[0]][1] <= group.budget:
            request_id = group.waiting.popleft()
            group.running[request_id] = None
            group.used += self._place[request_id][1]
            admitted.append(request_id)
        return Plan(group=key, admitted=tuple(admitted))

    def _next(self) -> Key:
        """The group whose turn it is; one at hand in its place while the first in line has patience."""
        first, group = next(iter(self._groups.items()))
        if self._at_hand(first) or group.passed_over >= self._patience:
            return first
        other = next((key for key in self._groups if self._at_hand(key)), None)
        if other is None:
            return first
        group.passed_over += 1
        return other

    def running(self, group: Key) -> tuple[str, ...]:
        """Requests admitted to a group and not yet removed, in the order of admission."""
        return tuple(self._groups[group].running) if group in self._groups else ()

    def waiting(self) -> int:
        """Requests not yet admitted, over all groups."""
        return sum(len(group.waiting) for group in self._groups.values())

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping contradicts itself. For tests and idle moments."""
        seen = set()
        for key, group in self._groups.items():
            assert group.running or group.waiting, f"{key} is empty"
            assert group.used == sum(self._place[r][1] for r in group.running), f"{key} miscounts its rows"
            assert group.used <= group.budget, f"{key} is over its budget"
            for request_id in (*group.running, *group.waiting):
                assert self._place[request_id][0] == key, f"{request_id} is in the wrong group"
                assert request_id not in seen, f"{request_id} is in two places"
                seen.add(request_id)
        assert seen == set(self._place), "requests without a place"
