"""`Connections`: the Redis and storage services that the parts of one client share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from redis import Redis

from calotype.job_changes import JobChangeListener
from calotype.resolver import Resolver
from calotype_shared.observability.telemetry import make_telemetry
from calotype_shared.observability.tracing import Telemetry
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage


@dataclass(frozen=True, kw_only=True)
class Connections:
    """Opened on first use, closed by the client that made them. Thread-safe."""

    settings: Settings
    redis: Redis
    store: JobStore
    storage: Storage
    resolver: Resolver
    job_changes: JobChangeListener
    telemetry: Telemetry
    clock: Callable[[], float]  # seconds
    sleep: Callable[[float], None]
    own_telemetry: bool

    @classmethod
    def make(
        cls,
        settings: Settings,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        telemetry: Telemetry | None,
    ) -> Connections:
        redis = connect_redis(settings)
        store = JobStore(
            redis,
            key_prefix=settings.key_prefix,
            retention_seconds=settings.retention_seconds,
            max_queued=settings.max_queued,
            max_queued_per_tenant=settings.max_queued_per_tenant,
        )
        storage = Storage(settings)
        return cls(
            settings=settings,
            redis=redis,
            store=store,
            storage=storage,
            resolver=Resolver(settings, store, storage, clock=clock),
            job_changes=JobChangeListener(redis, store.keys),
            telemetry=make_telemetry(settings, service="calotype-client") if telemetry is None else telemetry,
            clock=clock,
            sleep=sleep,
            own_telemetry=telemetry is None,
        )

    def close(self) -> None:
        self.job_changes.close()
        self.redis.close()
        if self.own_telemetry:
            self.telemetry.close()
