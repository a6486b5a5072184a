"""`Interning`: equal tensors get equal numbers, each tensor compared once."""

from __future__ import annotations

import weakref
from collections import OrderedDict

import torch

_REMEMBERED = 256


class Interning:
    """Numbers for tensors, equal for equal values. Owned by the engine's thread.

    Most tensors of a step are the same as in the step before. So the comparison by value, which waits for the device,
    is done once per request.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}  # by identity
        self._values: OrderedDict[int, torch.Tensor] = OrderedDict()  # the last used at the end
        self._next = 0

    def number(self, tensor: torch.Tensor) -> int:
        """Equal for tensors of equal shape, type and values."""
        version = tensor._version if not tensor.is_inference() else 0
        found = self._numbers.get(id(tensor))
        if found is not None and found[0]() is tensor and found[1] == version:
            return found[2]
        number = self._by_value(tensor)
        if len(self._numbers) > 16 * _REMEMBERED:
            self._numbers = {key: entry for key, entry in self._numbers.items() if entry[0]() is not None}
        self._numbers[id(tensor)] = (weakref.ref(tensor), version, number)
        return number

    def _by_value(self, tensor: torch.Tensor) -> int:
        for number, known in self._values.items():
            if (known.shape, known.dtype, known.device) == (tensor.shape, tensor.dtype, tensor.device) and torch.equal(
                known, tensor
            ):
                self._values.move_to_end(number)
                return number
        self._next += 1
        # A copy, because the caller may write into its own.
        self._values[self._next] = tensor.detach().clone()
        while len(self._values) > _REMEMBERED:
            self._values.popitem(last=False)
        return self._next
