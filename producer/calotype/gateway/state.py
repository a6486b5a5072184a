"""What every request needs, opened once per process: the client, the API keys, Redis for the event loop."""

from __future__ import annotations

import gc
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, cast

from fastapi import Depends, FastAPI, Request
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from calotype.api_keys import ApiKeys
from calotype.batches.dispatcher import Dispatcher
from calotype.batches.record import BatchRecord
from calotype.client import Client
from calotype.files import FileStore
from calotype.gateway.limits import Pool
from calotype.gateway.metrics import GatewayMetrics
from calotype.gateway.model_names import meant_model
from calotype.gateway.settings import GatewaySettings
from calotype_shared.errors import no_such_batch, no_such_job
from calotype_shared.observability.telemetry import make_telemetry
from calotype_shared.queue.connection import connect_redis, connection_options, is_outage, sentinel_options, unavailable
from calotype_shared.queue.job_reader import JobReader
from calotype_shared.queue.keys import Keys
from calotype_shared.queue.records import read_record
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage

_LINKS = 10_000  # maximum number of cached links
_CONNECTIONS = 256
# A worker may wait for minutes until storage answers; somebody who waits for a response may not.
_STORAGE_SECONDS, _STORAGE_ATTEMPTS = 10.0, 2
_POOL_SECONDS = 15.0


class Services:
    """Owned by the application and closed with it."""

    def __init__(self, settings: Settings, gateway: GatewaySettings) -> None:
        self.patient_settings = settings
        self.settings = settings = settings.model_copy(
            update={
                "s3_timeout_seconds": min(settings.s3_timeout_seconds, _STORAGE_SECONDS),
                "s3_attempts": min(settings.s3_attempts, _STORAGE_ATTEMPTS),
            }
        )
        self.gateway = gateway
        # Each is for calls that need one thing, so that a slow storage delays nothing that only needs Redis.
        self.in_redis = Pool("queue", 64, wait_seconds=_POOL_SECONDS)
        self.in_storage = Pool("storage", 32, wait_seconds=_POOL_SECONDS)
        self.in_images = Pool("image decoding", 2, wait_seconds=_POOL_SECONDS)
        self.telemetry = make_telemetry(settings, service="calotype-gateway")
        self.client = Client(settings=settings, telemetry=self.telemetry)
        self.keys = ApiKeys(connect_redis(settings), key_prefix=settings.key_prefix)
        self.jobs = JobReader(self.keys.redis, key_prefix=settings.key_prefix)
        self.storage = Storage(settings)
        self.files = FileStore(self.keys.redis, self.storage, key_prefix=settings.key_prefix)
        self._links: dict[str, tuple[float, str]] = {}  # by key: when to stop reusing the link, and the link
        self._names = Keys(settings.key_prefix)
        self._redis = _connect(settings)
        self.metrics = GatewayMetrics(settings, gateway) if gateway.metrics_port is not None else None

    async def job(self, job_id: str, tenant: str) -> JobRecord:
        """A tenant's current job record, read without a thread, because it is polled very often.

        Raises:
            JobNotFound: no job has this id, or it belongs to another tenant.
            RedisUnavailable: Redis cannot be reached.
        """
        try:
            fields: dict[str, str] = await self._redis.hgetall(self._names.job(job_id))  # type: ignore[assignment]
        except RedisError as error:
            if not is_outage(error):
                raise
            raise unavailable(error, str(self.settings.redis)) from error
        if not fields or fields.get("tenant", "default") != tenant:
            raise no_such_job(job_id)
        return read_record(job_id, fields)

    async def model(self, name: str | None) -> str:
        """The model that a request means by this name; None: it names none."""
        known = await self.in_redis(self.client.models)
        return meant_model(name, known, self.gateway.aliases, self.gateway.default_model)

    async def batch(self, batch_id: str, tenant: str) -> BatchRecord:
        """A tenant's batch as it is now. Raises BatchNotFound."""
        batch = await self.in_redis(self.client.batches.status, batch_id)
        if batch.tenant != tenant:
            raise no_such_batch(batch_id)
        return batch

    async def links(self, keys: Sequence[str]) -> list[str]:
        """Links to objects. Signing one takes a third of a millisecond, so links are reused for a while."""
        now = time.monotonic()
        if len(self._links) > _LINKS:
            self._links.clear()
        missing = [key for key in keys if self._links.get(key, (0.0, ""))[0] <= now]
        if missing:
            urls = await run_in_threadpool(lambda: [self.storage.presigned_url(key) for key in missing])
            until = now + self.settings.url_expires_seconds / 4
            self._links.update((key, (until, url)) for key, url in zip(missing, urls, strict=True))
        return [self._links[key][1] for key in keys]

    async def close(self) -> None:
        await self._redis.aclose()
        self.client.close()
        self.keys.redis.close()
        if self.metrics is not None:
            await run_in_threadpool(self.metrics.close)
        await run_in_threadpool(self.telemetry.close)


def _connect(settings: Settings) -> AsyncRedis:
    """As `connect_redis`, for the event loop."""
    address, options = settings.redis, {**connection_options(settings), "max_connections": _CONNECTIONS}
    if address.name:
        sentinel = AsyncSentinel(address.hosts, sentinel_kwargs=sentinel_options(settings))  # type: ignore[no-untyped-call]
        primary: AsyncRedis = sentinel.master_for(address.name, **options)
        return primary
    return AsyncRedis(**options)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Opens the services, and dispatches batches while serving."""
    services = cast(Services, app.state.services)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(services.close)
        if services.metrics is not None:
            services.metrics.start()
        if services.gateway.dispatch:
            on_webhook = services.metrics.webhook if services.metrics is not None else None
            stack.enter_context(Dispatcher(services.patient_settings, on_webhook=on_webhook))
        gc.freeze()  # imported modules stay: the collector need not traverse them, which takes 50 ms each time
        yield


async def services_of(request: Request) -> Services:
    """A dependency. Async, because FastAPI calls synchronous ones in a thread each time."""
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(services_of)]
