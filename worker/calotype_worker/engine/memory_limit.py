"""How much of a kind of work fits into the device's memory at a time, learned from where it did not."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_PATIENCE = 200  # good passes before a little more is tried
_LONGEST_PATIENCE = 20_000


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the device or of this machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator raises plain RuntimeErrors.
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def free_failed_pass(error: BaseException) -> None:
    """Free what a pass that failed still holds: its frames keep their tensors as long as its exception lives."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__context__
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class MemoryLimit:
    """At most `current` items at a time, of `most`. Owned by the engine's thread.

    Too many: half of what was tried, or what went through before, until it does again. After two hundred good passes a
    quarter more is tried, for memory may have been short for a passing reason; where that fails too, the next try comes
    twice as late. With `doubling` it is twice as many at a time, so that a power of two stays one.
    `on_lower(tried, current)` hears of each lowering.
    """

    def __init__(self, most: int, *, doubling: bool = False, on_lower: Callable[[int, int], None]) -> None:
        self.current = self._most = most
        self._doubling = doubling
        self._on_lower = on_lower
        self._proven = 0  # the largest part that went through
        self._good = 0  # passes since it last changed
        self._patience = _PATIENCE
        self._raised = False  # the last change was upwards

    def run(self, items: Sequence[Item], run: Callable[[Sequence[Item]], Result]) -> list[Result]:
        """`run` on parts of the items that fit, in order; the result of each part.

        Raises:
            Exception: what `run` raises, unless it is out of memory with more than one item.
        """
        results: list[Result] = []
        done = 0
        while done < len(items):
            part = items[done : done + self.current]
            try:
                results.append(run(part))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                free_failed_pass(error)
                if len(part) == 1:
                    self._on_lower(1, 1)
                    raise
                self._lower(len(part))
            else:
                done += len(part)
                self._went_through(len(part))
        return results

    def _lower(self, tried: int) -> None:
        if self._proven >= tried:
            self._proven = 0  # there is less memory now than there was then
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
