"""`PriorityRoundRobin`: in which order a worker's queues are asked for messages."""

from __future__ import annotations

from collections.abc import Iterable

from kombu.utils.scheduling import round_robin_cycle

from calotype_shared.schema.enums import Lane


class PriorityRoundRobin(round_robin_cycle):
    """Queues of the interactive lane before all others; within a lane, who was served goes to the end of it.

    So a worker with several models serves each of them, however long the line of one is.
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
