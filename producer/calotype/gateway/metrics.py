"""`GatewayMetrics`: metrics of a gateway or dispatcher, and of the whole fleet, on the metrics port.

The fleet is counted in Redis when it is scraped, at most once per second. All gateways export the same values, so
dashboards and rules take their maximum, never the sum.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from prometheus_client.registry import Collector

from calotype.gateway.settings import GatewaySettings
from calotype_shared.errors import ServiceUnavailable
from calotype_shared.observability import metric_names as names
from calotype_shared.observability.admin_server import AdminRequest, AdminResponse, AdminServer, probed
from calotype_shared.observability.metrics import Family, counter, family, histogram, new_registry, scraped
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.fleet_stats import FleetStats, FleetStatsReader
from calotype_shared.schema.enums import JobState
from calotype_shared.settings import Settings

_REMEMBERED_SECONDS = 1.0
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class GatewayMetrics:
    """Holds its port from construction; serves from `start` to `close`. Any thread may call the counting methods."""

    def __init__(self, settings: Settings, options: GatewaySettings) -> None:
        """Raises SettingsError if the port is not available."""
        assert options.metrics_port is not None
        registry = new_registry()
        self._requests = counter(names.HTTP_REQUESTS, registry)
        self._seconds = histogram(names.HTTP_REQUEST_SECONDS, registry)
        self._webhooks = counter(names.WEBHOOKS, registry)
        self._redis = connect_redis(settings)
        self._recent = RecentFleetStats(FleetStatsReader(self._redis, key_prefix=settings.key_prefix).take)
        registry.register(FleetCollector(self._recent))
        routes = {
            "/metrics": lambda asked: scraped(registry, asked),
            "/backlog": self._backlog,
            "/healthz": lambda _: probed(None),
            "/readyz": lambda _: probed(self._recent.problem()),
        }
        self._server = AdminServer(
            options.metrics_host, options.metrics_port, routes, setting="CALOTYPE_GATEWAY_METRICS_PORT"
        )

    @property
    def port(self) -> int:
        return self._server.port

    def start(self) -> None:
        self._server.start()

    def close(self) -> None:
        self._server.close()
        self._redis.close()

    def request(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """`route` is a template: a label that clients can choose freely would create unlimited series."""
        method = method if method in _METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route, method).observe(seconds)

    def webhook(self, outcome: str) -> None:
        self._webhooks.labels(outcome).inc()

    def _backlog(self, asked: AdminRequest) -> AdminResponse:
        """For autoscalers that read JSON: one object with `?model=NAME`, else one per model."""
        try:
            stats = self._recent.get()
        except ServiceUnavailable as error:
            return AdminResponse.of({"error": str(error)}, status=503)
        found = {
            model: {"queued": queued, "running": running, "backlog": queued + running}
            for model, (queued, running) in stats.backlog.items()
        }
        model = asked.query.get("model")
        if model is None:
            return AdminResponse.of({"models": found})
        return AdminResponse.of(found.get(model, {"queued": 0, "running": 0, "backlog": 0}))


class RecentFleetStats:
    """The newest statistics, read again if older than a second. Thread-safe: one thread reads, others wait for it."""

    def __init__(self, take: Callable[[], FleetStats], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._take = take
        self._clock = clock
        self._lock = threading.Lock()
        self._taken: tuple[float, FleetStats] | None = None

    def get(self) -> FleetStats:
        """Raises RedisUnavailable."""
        with self._lock:
            if self._taken is None or self._clock() - self._taken[0] >= _REMEMBERED_SECONDS:
                self._taken = None
                stats = self._take()
                self._taken = (self._clock(), stats)
            return self._taken[1]

    def problem(self) -> str | None:
        """Why there are no statistics now."""
        try:
            self.get()
        except ServiceUnavailable as error:
            return str(error)
        return None


class FleetCollector(Collector):
    """Counts the fleet when scraped. While Redis is unavailable, exports only that: old numbers would be wrong."""

    def __init__(self, recent: RecentFleetStats) -> None:
        self._recent = recent

    def describe(self) -> Iterable[Family]:
        """Empty, so that registering it does not query Redis."""
        return ()

    def collect(self) -> Iterable[Family]:
        try:
            stats = self._recent.get()
        except ServiceUnavailable:
            yield family(names.REDIS_UP, 0)
            return
        queues = {(queue.lane, queue.model): queue for queue in stats.queues}
        backlog = dict.fromkeys(stats.workers, (0, 0)) | stats.backlog
        yield family(names.REDIS_UP, 1)
        yield family(names.QUEUE_DEPTH, {labels: queue.waiting for labels, queue in queues.items()})
        yield family(names.OLDEST_JOB_AGE_SECONDS, {labels: queue.oldest_seconds for labels, queue in queues.items()})
        yield family(names.BACKLOG_JOBS, {(model,): sum(jobs) for model, jobs in backlog.items()})
        yield family(names.WORKERS, {(model,): count for model, count in stats.workers.items()})
        for metric in (names.UNFINISHED_JOBS, names.JOBS):
            yield family(metric, {(state,): stats.counts[JobState(state)] for state in metric.values})
        yield family(names.DEAD_JOBS, stats.dead)
        yield family(names.OPEN_BATCHES, stats.open_batches)
        yield family(names.WEBHOOKS_WAITING, stats.webhooks_waiting)
