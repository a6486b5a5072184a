"""Waits between attempts grow to a bound, and differ."""

from __future__ import annotations

import itertools

import pytest

from calotype_shared.backoff import delays


def test_the_bound_doubles_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest value that each wait can have."""
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    assert list(itertools.islice(delays(0.5, 3.0), 5)) == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_waits_are_spread_over_the_whole_range() -> None:
    """Of a thousand clients that failed together, each tenth of the range gets some: none are in step."""
    first = [next(delays(10.0, 10.0)) for _ in range(1_000)]
    assert {int(seconds) for seconds in first} == set(range(10))
