"""`Trust`: verifies merging. The first merge of each pattern also runs its calls separately and compares results.

Roles guessed from shapes can be wrong, and a network can mix rows (a norm over the batch, attention across it).
Both cause a difference, and such a pattern is never merged again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calotype_worker.models.pipeline.merge import CannotCut, Cuts
from calotype_worker.models.pipeline.tree import children

log = logging.getLogger(__name__)

_REMEMBERED = 4096
# Relative to the largest value of the tensor. Larger batches use other kernels, which round differently: by 1e-6 in
# float32. A network that mixes rows by less than the tolerance is not detected.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TF32_TOLERANCE = 5e-3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a pattern's merged result is cut, or why it is not merged."""

    cuts: Cuts | None
    reason: str = ""


class Trust:
    """Owned by the engine's thread."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[Hashable, Verdict] = OrderedDict()  # the last used at the end
        self._counts: dict[tuple[str, str], int] = {}

    @property
    def refused(self) -> list[tuple[str, str]]:
        """For each pattern that is not merged, its network and why."""
        return [(_network(pattern), found.reason) for pattern, found in self._verdicts.items() if found.cuts is None]

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        """Patterns by network and outcome ("verified" or "refused"), ever since. Thread-safe."""
        return self._counts.copy()

    def of(self, pattern: Hashable) -> Verdict | None:
        """The verdict about a pattern; None: never tried."""
        found = self._verdicts.get(pattern)
        if found is not None:
            self._verdicts.move_to_end(pattern)
        return found

    def accept(self, pattern: Hashable, cuts: Cuts) -> None:
        self._set(pattern, Verdict(cuts=cuts))

    def refuse(self, pattern: Hashable, reason: str) -> None:
        self._set(pattern, Verdict(cuts=None, reason=reason))
        log.info("calls that run alone", extra={"network": _network(pattern), "reason": reason})

    def _set(self, pattern: Hashable, verdict: Verdict) -> None:
        outcome = _network(pattern), "refused" if verdict.cuts is None else "verified"
        self._counts[outcome] = self._counts.get(outcome, 0) + 1
        self._verdicts[pattern] = verdict
        self._verdicts.move_to_end(pattern)
        while len(self._verdicts) > _REMEMBERED:
            self._verdicts.popitem(last=False)


def _network(pattern: Hashable) -> str:
    """The network of a pattern, which begins with the pattern of one call, and that with the call's place."""
    found: Any = pattern
    return str(found[0][0][0])


def difference(own: Any, apart: Any) -> str:
    """Where a part of a merged result differs from the call's own; empty if it does not.

    Raises:
        CannotCut: they are of different kinds.
    """
    if type(own) is not type(apart):
        raise CannotCut(f"{type(own).__name__} instead of {type(apart).__name__}")
    if isinstance(own, torch.Tensor):
        return _tensor_difference(own, apart)
    parts = children(own)
    if parts is None:
        return ""
    others = dict(children(apart) or ())
    for key, part in parts:
        if key not in others:
            raise CannotCut(f"{key!r} is missing")
        found = difference(part, others[key])
        if found:
            return f"{key}: {found}"
    return ""


def _tensor_difference(own: torch.Tensor, apart: torch.Tensor) -> str:
    if own.shape != apart.shape or own.dtype != apart.dtype:
        return f"{tuple(own.shape)} {own.dtype} instead of {tuple(apart.shape)} {apart.dtype}"
    if not own.numel() or not own.is_floating_point():
        return "" if torch.equal(own, apart) else "values differ"
    tolerance = _TOLERANCE.get(own.dtype, 1e-1)
    if own.device.type == "cuda" and own.dtype is torch.float32:
        tolerance = _TF32_TOLERANCE
    left, right = own.double(), apart.double()
    finite = right.isfinite()
    if not torch.equal(left.isfinite(), finite):
        return "other values are finite"
    left, right = left[finite], right[finite]
    scale = float(right.abs().max()) if right.numel() else 0.0
    worst = float((left - right).abs().max()) if right.numel() else 0.0
    return f"by {worst:.2g} of {scale:.2g}" if worst > tolerance * max(scale, 1e-6) else ""


def drew(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    """Whether random numbers were drawn between two states of generators."""
    return any(not torch.equal(left, right) for left, right in zip(before, after, strict=True))
