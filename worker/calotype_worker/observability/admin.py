"""`WorkerAdmin`: a worker's metrics port, if it has one: metrics, and whether it is alive and ready.

prometheus-client is imported only if that port is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from calotype_shared.observability import metric_names as names
from calotype_shared.observability.admin_server import AdminServer, probed
from calotype_worker.engine import Engine
from calotype_worker.engine.trace import Tracer, Tracers
from calotype_worker.observability.counters import Counters
from calotype_worker.settings import WorkerSettings

_SILENCE_SECONDS = 60.0  # of the heartbeat's thread, which also runs while Redis is unavailable


class WorkerAdmin:
    """Created before the model is loaded, so that a used port is reported immediately. Serves after `start`."""

    def __init__(self, options: WorkerSettings) -> None:
        """Raises SettingsError if the port is not available."""
        self._server: AdminServer | None = None
        self._not_alive: Callable[[], str | None] = lambda: "starting"
        self._not_ready: Callable[[], str | None] = lambda: "starting"
        if options.metrics_port is None:
            return
        from calotype_shared.observability.metrics import new_registry, scraped  # noqa: PLC0415

        registry = self._registry = new_registry()
        routes = {
            "/metrics": lambda asked: scraped(registry, asked),
            "/healthz": lambda _: probed(self._not_alive()),
            "/readyz": lambda _: probed(self._not_ready()),
        }
        self._server = AdminServer(
            options.metrics_host, options.metrics_port, routes, setting="CALOTYPE_WORKER_METRICS_PORT"
        )

    def tracer(self, trace: Tracer, models: Iterable[str]) -> Tracer:
        """`trace`, plus a tracer that turns the same spans into metrics."""
        if self._server is None:
            return trace
        from calotype_worker.observability.metrics import SpanMeters  # noqa: PLC0415

        return Tracers([trace, SpanMeters(self._registry, models)])

    def watch(
        self,
        *,
        info: Mapping[str, str],
        device: str,
        engine: Engine,
        silent_seconds: Callable[[], float],
        counters: Counters,
        gauges: Mapping[names.Metric, Callable[[], float]],
        not_ready: Callable[[], str | None],
    ) -> None:
        """Report these from now on. `not_ready` says why no jobs are claimed, if so."""

        def not_alive() -> str | None:
            if not engine.alive:
                return "the engine's thread has ended"
            if (hanging := engine.overdue) is not None:
                return f"the engine hangs: {hanging}"
            if (silent := silent_seconds()) > _SILENCE_SECONDS:
                return f"the heartbeat's thread has been stuck for {silent:.0f} s"
            return None

        self._not_alive = not_alive
        self._not_ready = lambda: not_alive() or not_ready()
        if self._server is None:
            return
        from calotype_worker.observability.metrics import WorkerCollector  # noqa: PLC0415

        self._registry.register(
            WorkerCollector(
                info=info,
                device=torch.device(device),
                stats=engine.stats,
                merge_patterns=engine.merge_patterns,
                counters=counters,
                gauges=gauges,
            )
        )

    @property
    def port(self) -> int | None:
        return self._server.port if self._server else None

    def start(self) -> None:
        if self._server is not None:
            self._server.start()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
