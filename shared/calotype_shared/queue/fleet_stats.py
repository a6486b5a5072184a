"""`FleetStats`: queued jobs, running jobs and live workers at one moment, for monitoring and autoscaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from calotype_shared.queue.fleet import Fleet
from calotype_shared.queue.scripts import said_clearly
from calotype_shared.schema.enums import JobState

# A tenant's jobs are queued by age, and fair share keeps every tenant's first job near the front.
_FRONT = 64  # jobs inspected per queue
_LEASES = 1_000  # sample size if more jobs are running


@dataclass(frozen=True, kw_only=True)
class QueueCount:
    """One queue: a lane of a model, or of several models joined by + that its jobs need together."""

    model: str
    lane: str
    waiting: int
    running: int
    oldest_seconds: float  # waiting time of the oldest job near the front; 0 if the queue is empty


@dataclass(frozen=True, kw_only=True)
class FleetStats:
    """A snapshot. `workers` counts live workers that are not draining, by the model or models that they serve."""

    queues: tuple[QueueCount, ...]
    workers: Mapping[str, int]
    counts: Mapping[JobState, int]
    dead: int
    open_batches: int
    webhooks_waiting: int

    @property
    def backlog(self) -> dict[str, tuple[int, int]]:
        """(queued, running) by model."""
        found: dict[str, tuple[int, int]] = {}
        for queue in self.queues:
            queued, running = found.get(queue.model, (0, 0))
            found[queue.model] = (queued + queue.waiting, running + queue.running)
        return found


class FleetStatsReader(Fleet):
    """Reads the stats in three round trips, whose cost does not depend on the number of queued jobs."""

    @said_clearly
    def take(self) -> FleetStats:
        """Raises RedisUnavailable."""
        queues, counts, dead, open_batches, webhooks = self._run("fleet_stats", [_FRONT, _LEASES])
        lines = [
            QueueCount(
                model=name.rpartition(".")[0],
                lane=name.rpartition(".")[2],
                waiting=waiting,
                running=running,
                oldest_seconds=int(longest) / 1e6,
            )
            for name, waiting, running, longest in sorted(queues)
        ]
        serving = [set(worker.models) for worker in self.workers() if not worker.draining]
        asked = {line.model for line in lines}.union(*serving)
        by_state = dict(zip(counts[::2], map(int, counts[1::2]), strict=True))
        return FleetStats(
            queues=tuple(lines),
            workers={model: sum(set(model.split("+")) <= own for own in serving) for model in sorted(asked)},
            counts={state: by_state.get(state.value, 0) for state in JobState},
            dead=dead,
            open_batches=open_batches,
            webhooks_waiting=webhooks,
        )
