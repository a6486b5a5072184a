"""How many rows of one kind of work fit into the device's memory together, learned from passes that did not fit."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_PATIENCE = 200  # successful passes before the limit is raised
_LONGEST_PATIENCE = 20_000


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or this machine ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator raises plain RuntimeErrors.
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def free_failed_pass(error: BaseException) -> None:
    """Free the memory of a failed pass: the exception's frames keep their tensors alive."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__context__
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class MemoryLimit:
    """Runs items of at most `current` rows at a time, never more than `most`. Owned by the engine's thread.

    After running out of memory, the limit becomes half of the size that failed or, if larger, the largest size that has
    succeeded. The shortage may be temporary, so after 200 successful passes the limit is raised by a quarter. If
    that fails too, the next attempt waits for twice as many passes. With `doubling` the limit is doubled instead, so
    that a power of two stays one.
    `on_lower(tried, current)` is called each time the limit is lowered.
    """

    def __init__(self, most: int, *, doubling: bool = False, on_lower: Callable[[int, int], None]) -> None:
        self.current = self._most = most
        self._doubling = doubling
        self._on_lower = on_lower
        self._proven = 0  # the largest part that succeeded
        self._good = 0  # passes since it last changed
        self._patience = _PATIENCE
        self._raised = False  # the last change was upwards

    def allow(self, rows: int) -> None:
        """A single item has so many rows, and may run unless memory was too small."""
        if rows > self._most:
            self.current = rows if self.current == self._most else self.current
            self._most = rows

    def run(
        self,
        items: Sequence[Item],
        run: Callable[[Sequence[Item]], Result],
        *,
        rows: Callable[[Item], int] = lambda _: 1,
    ) -> list[Result]:
        """Call `run` on parts of the items that fit into memory, in order. Returns each part's result.

        `rows(item)` is the item's size. A part has at least one item, whatever its size.

        Raises:
            Exception: what `run` raises, except running out of memory with more than one item.
        """
        results: list[Result] = []
        done = 0
        while done < len(items):
            count = self._fitting(items[done:], rows)
            part = items[done : done + count]
            size = sum(map(rows, part))
            try:
                results.append(run(part))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                free_failed_pass(error)
                if len(part) == 1:
                    self._on_lower(size, size)
                    raise
                self._lower(size)
            else:
                done += count
                self._went_through(size)
        return results

    def _fitting(self, items: Sequence[Item], rows: Callable[[Item], int]) -> int:
        """How many of the first items have at most `current` rows together; at least one."""
        total = 0
        for index, item in enumerate(items):
            total += rows(item)
            if total > self.current:
                return max(1, index)
        return len(items)

    def _lower(self, tried: int) -> None:
        if self._proven >= tried:
            self._proven = 0  # less memory is available now than before
        self.current = max(1, tried // 2, self._proven)
        self._patience = min(2 * self._patience, _LONGEST_PATIENCE) if self._raised else _PATIENCE
        self._good, self._raised = 0, False
        self._on_lower(tried, self.current)

    def _went_through(self, count: int) -> None:
        self._proven = max(self._proven, count)
        if self.current == self._most:
            return
        self._good += 1
        if self._good >= self._patience:
            more = self.current if self._doubling else max(1, self.current // 4)
            self.current = min(self._most, self.current + more)
            self._good, self._raised = 0, True
