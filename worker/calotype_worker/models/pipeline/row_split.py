"""Runs one network call in parts of a few rows each, where its result was found to be the same."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any

import torch

from calotype_worker.models.pipeline.call import Described
from calotype_worker.models.pipeline.merge import CannotCut, Cuts
from calotype_worker.models.pipeline.network_calls import NetworkCalls, alone, run_as
from calotype_worker.models.pipeline.roles import Kind, size_of
from calotype_worker.models.pipeline.stand_in import Call
from calotype_worker.models.pipeline.tree import Path, children, rebuilt, with_children
from calotype_worker.models.pipeline.trust import difference

log = logging.getLogger(__name__)


class RowSplit:
    """For calls that do not fit into memory by themselves. Owned by the engine's thread.

    That calls can be merged does not show that the rows of one call are independent. So splitting is tried when the
    model is loaded, at a small size, and done only for the patterns for which it gave the same result.
    """

    def __init__(self, calls: NetworkCalls) -> None:
        self._calls = calls
        self._independent: set[Hashable] = set()

    def learn(self, recorded: Sequence[Call]) -> None:
        """Try it with the last call of each network's method."""
        for call in {call.place: call for call in recorded}.values():
            described = self._calls.describe(call)
            if described is None or described.rows < 2 or self._calls.cuts(described) is None:
                continue
            try:
                parts = [self.part(described, row, 1) for row in range(described.rows)]
                if not difference(self.joined(described, parts), alone(call)):
                    self._independent.add(described.pattern)
            except Exception as error:  # of the network, which may not know so few rows
                log.debug("rows not split", extra={"place": call.place}, exc_info=error)

    def can(self, call: Described | None) -> bool:
        """Whether the call has several rows that do not depend on each other."""
        return call is not None and call.rows > 1 and call.pattern in self._independent

    def part(self, call: Described, first: int, count: int) -> Any:
        """The result of some of its rows. Raises what the network raises, and CannotCut."""
        found: dict[Path, Any] = {}
        for path, value, role in call.roles:
            if role.kind not in (Kind.ROWS, Kind.LIST):
                continue
            per_row = Fraction(size_of(value, role), call.rows)
            if per_row < 1:
                continue  # one for all rows of a request
            start, length = first * per_row, count * per_row
            if start.denominator != 1 or length.denominator != 1:
                raise CannotCut(f"the argument at {path} does not follow the rows")
            if role.kind is Kind.LIST:
                found[path] = value[int(start) : int(start + length)]
            else:
                found[path] = value.narrow(role.dim, int(start), int(length))
        arguments = rebuilt(dict(call.arguments), found)
        names = list(call.arguments)[: len(call.call.args)]
        return run_as(call.call, tuple(arguments.pop(name) for name in names), arguments)

    def joined(self, call: Described, parts: Sequence[Any]) -> Any:
        """The result of the whole call. Raises CannotCut."""
        cuts = self._calls.cuts(call)
        if cuts is None:
            raise CannotCut("how its result follows its rows is not known any more")
        return _joined(list(parts), cuts, ())


def _joined(parts: list[Any], cuts: Cuts, path: Path) -> Any:
    own = cuts.get(path)
    if own is not None:
        if own.dim >= 0:
            return torch.cat(parts, own.dim)
        return type(parts[0])(element for part in parts for element in part)
    if isinstance(parts[0], torch.Tensor) or children(parts[0]) is None:
        return parts[0]
    others = [dict(children(part) or ()) for part in parts]
    return with_children(parts[0], lambda key, _: _joined([other[key] for other in others], cuts, (*path, key)))
