"""Merges described calls into one, learns how its result is cut, and cuts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.nn.functional import pad

from calotype_worker.models.pipeline.call import Described, Padding
from calotype_worker.models.pipeline.roles import Kind
from calotype_worker.models.pipeline.tree import Path, children, rebuilt, with_children

_DEPTH = 12  # of results: deeper is something that refers to itself


class CannotCut(Exception):
    """A merged call's result cannot be cut into those of its calls."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one tensor or list of a result is cut.

    Each row gets `per_row` entries along `dim`, cut back to the call's own length along `padded`.
    """

    dim: int  # -1: a list
    per_row: Fraction
    padded: int | None = None


# By path in the result. Whatever has no entry is the same for all calls.
Cuts = Mapping[Path, Cut]


def padded_paths(calls: Sequence[Described]) -> frozenset[Path]:
    """The arguments whose lengths differ."""
    lengths: dict[Path, set[int]] = {}
    for call in calls:
        for padding in call.paddings:
            lengths.setdefault(padding.path, set()).add(padding.length)
    return frozenset(path for path, found in lengths.items() if len(found) > 1)


def merge(calls: Sequence[Described], *, expand: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one call for all rows. `expand`: scalars are repeated for each row."""
    first = calls[0]
    values = [{path: value for path, value, _ in call.roles} for call in calls]
    padded = padded_paths(calls)
    masks = {padding.mask for padding in first.paddings}
    found: dict[Path, Any] = {}
    for path, value, role in first.roles:
        if path in masks:
            continue
        if role.kind is Kind.ROWS:
            parts = [own[path] for own in values]
            if path in padded:
                longest = max(part.shape[1] for part in parts)
                parts = [_lengthen(part, longest) for part in parts]
            found[path] = torch.cat(parts, role.dim)
        elif role.kind is Kind.LIST:
            found[path] = type(value)(part for own in values for part in own[path])
        elif role.kind is Kind.SCALAR and expand:
            found[path] = torch.cat(
                [own[path].reshape(-1).expand(call.rows) for call, own in zip(calls, values, strict=True)]
            )
    for padding in first.paddings:
        if padding.mask is not None:
            mask = _mask(calls, values, padding, padded)
            if mask is not None:
                found[padding.mask] = mask
    arguments = rebuilt(dict(first.arguments), found)
    for path, value in found.items():
        if path[0] not in arguments:  # a mask that the calls did not have
            arguments[path[0]] = value
    names = list(first.arguments)[: len(first.call.args)]
    return tuple(arguments.pop(name) for name in names), arguments


def _lengthen(part: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - part.shape[1]
    return pad(part, (0, 0) * (part.ndim - 2) + (0, missing)) if missing else part


def _mask(
    calls: Sequence[Described], values: Sequence[Mapping[Path, Any]], padding: Padding, padded: frozenset[Path]
) -> torch.Tensor | None:
    """The merged mask of an argument. A call without one means ones."""
    assert padding.mask is not None
    present = [own[padding.mask] for own in values if own.get(padding.mask) is not None]
    if not present and padding.path not in padded:
        return None
    lengths = [values[index][padding.path].shape[1] for index in range(len(calls))]
    longest = max(lengths)
    parts = []
    for own, length in zip(values, lengths, strict=True):
        mask = own.get(padding.mask)
        if mask is None:
            tensor = own[padding.path]
            dtype = present[0].dtype if present else torch.bool
            mask = torch.ones((tensor.shape[0], length), dtype=dtype, device=tensor.device)
        parts.append(_lengthen(mask, longest))
    return torch.cat(parts)


def learn(calls: Sequence[Described], merged: Any, apart: Sequence[Any]) -> Cuts:
    """Learn how to cut `merged` into the results of the calls when run `apart`.

    Raises:
        CannotCut: their results are not parts of it.
    """
    found: dict[Path, Cut] = {}
    _learn(calls, merged, list(apart), (), found)
    return found


def _learn(calls: Sequence[Described], merged: Any, apart: list[Any], path: Path, found: dict[Path, Cut]) -> None:
    if len(path) > _DEPTH or any(type(part) is not type(merged) for part in apart):
        raise CannotCut(f"results differ in kind at {path}")
    if isinstance(merged, torch.Tensor):
        cut = _learn_tensor(calls, merged, apart, path)
        if cut is not None:
            found[path] = cut
        return
    parts = children(merged)
    if parts is None:
        return
    if isinstance(merged, list | tuple):
        counts = [len(part) for part in apart]
        if len(merged) == sum(counts):
            found[path] = Cut(dim=-1, per_row=_per_row(calls, counts, path))
            return
    others = [dict(children(part) or ()) for part in apart]
    for key, part in parts:
        if any(key not in other for other in others):
            raise CannotCut(f"results differ in parts at {path}")
        _learn(calls, part, [other[key] for other in others], (*path, key), found)


def _learn_tensor(
    calls: Sequence[Described], merged: torch.Tensor, apart: Sequence[torch.Tensor], path: Path
) -> Cut | None:
    if any(part.ndim != merged.ndim for part in apart):
        raise CannotCut(f"results differ in dimensions at {path}")
    dim = next((d for d in range(merged.ndim) if merged.shape[d] == sum(part.shape[d] for part in apart)), None)
    padded = None
    for other in range(merged.ndim):
        sizes = [part.shape[other] for part in apart]
        if other == dim or all(size == merged.shape[other] for size in sizes):
            continue
        if padded is None and sizes == _lengths(calls) and merged.shape[other] == max(sizes):
            padded = other
        else:
            raise CannotCut(f"results differ in shape at {path}: {tuple(merged.shape)}")
    if dim is None:
        if padded is not None:
            raise CannotCut(f"what is shared differs in length at {path}")
        return None
    return Cut(dim=dim, per_row=_per_row(calls, [part.shape[dim] for part in apart], path), padded=padded)


def _lengths(calls: Sequence[Described]) -> list[int] | None:
    """Each call's own length of the one argument that was padded."""
    padded = padded_paths(calls)
    if len(padded) != 1:
        return None
    return [padding.length for call in calls for padding in call.paddings if padding.path in padded]


def _per_row(calls: Sequence[Described], sizes: Sequence[int], path: Path) -> Fraction:
    shares = {Fraction(size, call.rows) for size, call in zip(sizes, calls, strict=True)}
    if len(shares) != 1:
        raise CannotCut(f"results do not follow the rows at {path}")
    return shares.pop()


def cut(calls: Sequence[Described], merged: Any, cuts: Cuts) -> list[Any]:
    """Each call's own result.

    Raises:
        CannotCut: its length differs from what `cuts` states.
    """
    lengths = _lengths(calls)
    results = []
    before = 0
    total = sum(call.rows for call in calls)
    for index, call in enumerate(calls):
        length = None if lengths is None else lengths[index]
        results.append(_Slice(cuts, before, call.rows, total, length).of(merged, ()))
        before += call.rows
    return results


@dataclass(frozen=True)
class _Slice:
    cuts: Cuts
    before: int  # rows of calls before it
    rows: int
    total: int
    length: int | None

    def of(self, value: Any, path: Path) -> Any:
        own = self.cuts.get(path)
        if own is not None:
            start, count = self.before * own.per_row, self.rows * own.per_row
            whole = len(value) if own.dim < 0 else value.shape[own.dim]
            if start.denominator != 1 or count.denominator != 1 or self.total * own.per_row != whole:
                raise CannotCut(f"{whole} rows at {path} instead of {self.total * own.per_row}")
            if own.dim < 0:
                return value[int(start) : int(start + count)]
            part = value.narrow(own.dim, int(start), int(count))
            if own.padded is not None and self.length is not None:
                part = part.narrow(own.padded, 0, self.length)
            return part.contiguous()
        if isinstance(value, torch.Tensor):
            return value.clone()  # the caller may write into its own result
        if children(value) is None:
            return value
        return with_children(value, lambda key, part: self.of(part, (*path, key)))
