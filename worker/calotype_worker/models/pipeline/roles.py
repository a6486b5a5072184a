"""`Roles`: which dimension of each network argument counts the batch's rows, derived from two recorded runs.

A dimension that is twice as long in a run for two requests as in one for a single request is the batch's; a list that
is twice as long holds one element per row. Roles that the runs do not show are guessed from shapes. Merges
based on a wrong guess are detected by `trust`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from calotype_worker.models.pipeline.tree import Path, leaves

Place = tuple[str, str]  # component, method
Arguments = Mapping[str, Any]  # by the name of the parameter


class Kind(Enum):
    """How the argument of a merged call follows from those of the single ones."""

    ROWS = "rows"  # laid end to end in the role's dimension
    LIST = "list"  # lists laid end to end
    SCALAR = "scalar"  # one number for all rows: repeated for each, then laid end to end
    SHARED = "shared"  # a tensor that must be equal
    VALUE = "value"  # a Python value that must be equal
    OBJECT = "object"  # must be the same object
    GENERATOR = "generator"  # excluded from the comparison; see `trust`


@dataclass(frozen=True)
class Role:
    kind: Kind
    dim: int = 0


_ROWS = Role(Kind.ROWS)
_LIST = Role(Kind.LIST)
_SHARED = Role(Kind.SHARED)


@dataclass(kw_only=True, eq=False)
class Roles:
    """Filled when the model is loaded, only read afterwards."""

    known: dict[Place, dict[Path, Role]] = field(default_factory=dict)

    def learn(self, place: Place, single: Sequence[Arguments], double: Sequence[Arguments]) -> None:
        """Compare a component's calls of a run for one request with those of a run for two, in order."""
        if len(single) != len(double):
            return
        found: dict[Path, Role] = {}
        for one, two in zip(single, double, strict=True):
            _compare(one, two, (), found)
        if any(role.kind in (Kind.ROWS, Kind.LIST) for role in found.values()):
            self.known.setdefault(place, {}).update(found)

    def lists(self, place: Place) -> frozenset[Path]:
        """Lists that hold one element per row."""
        return frozenset(path for path, role in self.known.get(place, {}).items() if role.kind is Kind.LIST)

    def of(self, place: Place, arguments: Arguments) -> list[tuple[Path, Any, Role]]:
        """Each leaf of a call's arguments and its role."""
        known = self.known.get(place, {})
        found = list(leaves(dict(arguments), whole=self.lists(place)))
        rows = _count(found, known)
        return [(path, value, _role(value, known.get(path), rows, probed=bool(known))) for path, value in found]


def size_of(value: Any, role: Role) -> int:
    """Its length along the batch."""
    return len(value) if role.kind is Kind.LIST else int(value.shape[role.dim])


def _compare(one: Any, two: Any, path: Path, found: dict[Path, Role]) -> None:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        doubled = [d for d in range(one.ndim) if one.ndim == two.ndim and two.shape[d] == 2 * one.shape[d] > 0]
        if doubled and found.get(path, _SHARED) == _SHARED:
            found[path] = Role(Kind.ROWS, doubled[0])
        if one.ndim and one.shape != (1,):
            found.setdefault(path, _SHARED)
        return
    if type(one) is not type(two):
        return
    if isinstance(one, list | tuple) and len(two) == 2 * len(one) > 0:
        found.setdefault(path, _LIST)
    elif isinstance(one, list | tuple) and len(one) == len(two):
        for index, (left, right) in enumerate(zip(one, two, strict=True)):
            _compare(left, right, (*path, index), found)
    elif isinstance(one, Mapping):
        for key in one.keys() & two.keys():
            _compare(one[key], two[key], (*path, key), found)


def _count(found: Sequence[tuple[Path, Any]], known: Mapping[Path, Role]) -> int:
    """Number of rows of a call: of the first argument known to count them, else the first with a batch dimension."""
    for path, value in found:
        role = known.get(path)
        if role is not None and role != _SHARED and _fits(value, role):
            return size_of(value, role)
    for _, value in found:
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            return int(value.shape[0])
    return 1


def _fits(value: Any, role: Role) -> bool:
    if role.kind is Kind.LIST:
        return isinstance(value, list | tuple) and len(value) > 0
    return isinstance(value, torch.Tensor) and value.ndim > role.dim


def _role(value: Any, known: Role | None, rows: int, *, probed: bool) -> Role:
    if known is not None and _fits(value, known):
        return known
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or (value.shape == (1,) and rows >= 1):
            return Role(Kind.SCALAR)
        # It was in none of the runs: blocks run other calls for other inputs, for example.
        length = value.shape[0]
        # A vector of another length holds one value for each layer or block, as Wan VACE's scales do.
        exact = probed or value.ndim == 1
        guessed = length == rows if exact else bool(length) and length % rows == 0
        return _ROWS if guessed else _SHARED
    if isinstance(value, torch.Generator):
        return Role(Kind.GENERATOR)
    return Role(Kind.VALUE if _plain(value) else Kind.OBJECT)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return (
        value is None
        or isinstance(value, bool | int | float | str | bytes | Enum | torch.dtype | torch.device)
        or (isinstance(value, dict) and not value)
    )
