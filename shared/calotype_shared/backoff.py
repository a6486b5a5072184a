"""How long to wait before the next attempt: full jitter, so that clients that failed together do not return together.

Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import random
from collections.abc import Iterator


def full_jitter(longest: float) -> float:
    """Between 0 and `longest` seconds."""
    return random.uniform(0, longest)


def delays(first: float, longest: float) -> Iterator[float]:
    """Seconds after each failed attempt, without end: full jitter of a bound that doubles from `first` to `longest`."""
    bound = first
    while True:
        yield full_jitter(bound)
        bound = min(longest, bound * 2)
