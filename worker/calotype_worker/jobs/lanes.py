"""`PriorityRoundRobin`: the order in which a worker polls its queues for messages."""

from __future__ import annotations

from collections.abc import Iterable

from kombu.utils.scheduling import round_robin_cycle

from calotype_shared.schema.enums import Lane


class PriorityRoundRobin(round_robin_cycle):
    """Interactive queues come before all others. Within a lane, a queue that was served moves to the end.

    So a worker with several models serves all of them, however long the queue of one is.
    """

    def update(self, it: Iterable[str]) -> None:
        super().update(it)
        self._by_lane()

    def rotate(self, last_used: str) -> str:
        super().rotate(last_used)
        self._by_lane()
        return last_used

    def _by_lane(self) -> None:
        self.items.sort(key=lambda queue: not queue.endswith(f".{Lane.INTERACTIVE.value}"))  # stable
