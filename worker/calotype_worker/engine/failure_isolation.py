"""Runs work on many items at once, and on a failure finds the items that cause it, so that they fail alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from calotype_worker.engine.memory_limit import free_failed_pass, is_out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost, so that no further work on it can succeed in this process."""
    lost = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
    return lost and not isinstance(error, torch.OutOfMemoryError)


def run_isolating_failures(
    items: Sequence[Item], run: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result | Exception]:
    """Return `run(items)` as a list. If it raises, run each half separately, down to single items.

    The list holds for each item, in order, its result or the exception that it raises even when run alone. So one bad
    item fails alone, and a batch that is too large for the device's memory succeeds in smaller parts.

    Raises:
        Exception: only errors for which `is_fatal` holds.
    """
    try:
        return list(run(items))
    except Exception as error:
        if is_fatal(error):
            raise
        if is_out_of_memory(error):
            free_failed_pass(error)
        if len(items) == 1:
            return [error]
    half = len(items) // 2
    return run_isolating_failures(items[:half], run) + run_isolating_failures(items[half:], run)
