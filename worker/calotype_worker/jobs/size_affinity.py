"""`SizeAffinity`: the rows that a worker runs, by model and shape, so that it prefers jobs that join a step batch.

Rows count from the claim, not from when they reach the engine, because each of many jobs claimed together must take
the earlier ones into account.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from calotype_shared.errors import InvalidRequest
from calotype_shared.queue.job_store import Claim
from calotype_shared.queue.keys import models_of

_MOST_SHAPES = 16  # that a claim names
_TURN_SECONDS = 0.1  # maximum wait for other claims: if Redis hangs, waits would add up


class SizeAffinity:
    """Thread-safe. Prefers jobs of sizes that are already running.

    `budget(model, width, height)` is how many rows may run together, `rows(model, guided)` how many an image has.

    The `in_order` (interactive) queues are claimed strictly in order; jobs claimed from them count as running, too.
    """

    def __init__(
        self,
        lookahead: int,
        *,
        budget: Callable[[str, int, int], int],
        rows: Callable[[str, bool], int],
        in_order: frozenset[str] = frozenset(),
    ) -> None:
        self.lookahead = lookahead  # jobs of a queue to consider; 0: always the first
        self._budget = budget
        self._rows = rows
        self._in_order = in_order
        self._turn = threading.Lock()  # held during a claim, so that the next one knows its result
        self._lock = threading.Lock()  # guards the two below
        self._running: dict[tuple[str, int, int], int] = {}  # rows by model, width and height; the newest last
        self._claims: dict[str, dict[tuple[str, int, int], int]] = {}  # by folder, which is unique to an attempt

    @contextmanager
    def preferred_shapes(self, *queues: str) -> Iterator[list[str]]:
        """Use it around a claim, and `claimed` after it. Yields the shapes that the claim should prefer."""
        if not self.lookahead or not self._in_order.isdisjoint(queues):
            yield []
            return
        mine = self._turn.acquire(timeout=_TURN_SECONDS)
        try:
            yield self.wanted(*queues)
        finally:
            if mine:
                self._turn.release()

    def wanted(self, *queues: str) -> list[str]:
        """Running shapes with space for more rows, of the models of these queues."""
        models = {model for queue in queues for model in models_of(queue)}
        with self._lock:
            running = list(reversed(self._running.items()))
        found = (
            f"{width}x{height}"
            for (model, width, height), rows in running
            if model in models and rows < self._budget(model, width, height)
        )
        return list(islice(dict.fromkeys(found), _MOST_SHAPES))

    def claimed(self, claim: Claim) -> None:
        """Its rows are as good as running."""
        config = claim.config
        own: dict[tuple[str, int, int], int] = {}
        try:
            for model in (config.model, *config.ensemble):
                key = (model, config.width, config.height)
                self._budget(*key)
                own[key] = own.get(key, 0) + config.num_images * self._rows(model, config.guided)
        except InvalidRequest:
            return  # it fails on submission, with a better message
        with self._lock:
            self._claims[claim.folder] = own
            for key, rows in own.items():
                self._running[key] = self._running.get(key, 0) + rows

    def released(self, claim: Claim) -> None:
        """Its images are finished, or never will be. May be called twice."""
        with self._lock:
            for key, rows in self._claims.pop(claim.folder, {}).items():
                self._running[key] -= rows
                if not self._running[key]:
                    del self._running[key]
