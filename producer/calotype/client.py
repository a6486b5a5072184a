"""`Client`: submits jobs, follows them and fetches their images."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, Unpack

from opentelemetry.trace import SpanKind

from calotype.batches.client import Batches, BatchHandle
from calotype.connections import Connections
from calotype.dead import DeadJobs
from calotype.fields import JobFields
from calotype.job_image import ImageSource
from calotype.jobs import JobHandle, Jobs
from calotype.overview import Overview, look
from calotype.resolver import Submission, idempotency, storable
from calotype_shared.errors import InvalidRequest, QueueFull
from calotype_shared.observability.tracing import Telemetry, span_block, traceparent_of
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.settings import Settings

if TYPE_CHECKING:
    from calotype_shared.schema.worker_info import WorkerInfo

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 60.0  # with a queue that fills up in the middle of a submission
_PAUSE_SECONDS = 5.0


class Client(Jobs):
    """Talks to one Redis and one bucket; safe to share between threads. Connects on first use.

    ```python
    with Client() as client:  # CALOTYPE_REDIS_URL, CALOTYPE_S3_…
        job = client.submit("a red circle on a blue background", seed=7)
        job.result()[0].save("circle.png")
    ```

    `batches` and `dead_jobs` handle batches and jobs that failed permanently. Wherever a job is
    expected, pass its id or its handle. Every call can raise `RedisUnavailable` or `StorageUnavailable`;
    nothing is half-written then. `on_warning` is called with messages for the user during a wait, such as that
    no worker serves the model.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        settings: Settings | None = None,
        on_warning: Callable[[str], None] = log.warning,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        telemetry: Telemetry | None = None,
    ) -> None:
        if settings is None:
            settings = Settings.load(redis_url=redis_url)
        elif redis_url is not None:
            settings = settings.model_copy(update={"redis_url": redis_url})
        self._connections = Connections.make(settings, clock=clock, sleep=sleep, telemetry=telemetry)
        super().__init__(self._connections, on_warning=on_warning)
        self._sleep = sleep
        self._telemetry = self._connections.telemetry
        self._resolver = self._connections.resolver
        self.batches = Batches(self._connections)
        self.dead_jobs = DeadJobs(self._connections, submit=self.submit)

    def batch(self, batch_id: str) -> BatchHandle:
        """A handle of the batch, without a round trip: a missing batch raises an error at the first use."""
        return BatchHandle(self.batches, batch_id)

    def submit(
        self,
        config: Submission,
        *,
        lane: Lane = Lane.INTERACTIVE,
        metadata: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        webhook_url: str | None = None,
        **fields: Unpack[JobFields],
    ) -> JobHandle:
        """Queue one job. `config` is a config or a prompt; `fields` are any of `GenerationConfig`'s, and `quality`.

        A second submission with the same `idempotency_key` returns the first job. `webhook_url` is called when the
        job is final.

        Raises:
            InvalidRequest: a field is invalid; nothing was queued. `UnknownModel` if no worker ever announced the
                model, `IdempotencyConflict` if the key was used for a different request.
            QueueFull: the limit of queued jobs is reached; retry after `retry_after_seconds`. Nothing was queued.
        """
        tenant = self._resolver.tenant(tenant)
        parsed = self._resolver.parse(config, fields)
        attributes = {"calotype.model": parsed.model, "calotype.lane": lane.value}
        with span_block(self._telemetry.tracer, "submit", kind=SpanKind.PRODUCER, attributes=attributes) as span:
            [job_id] = self._store.create(
                [self._resolver.new_job(parsed, lane=lane, tenant=tenant)],
                lane=lane,
                metadata=storable(metadata),
                tenant=tenant,
                webhook=self._resolver.webhook(webhook_url),
                reuse=self.settings.reuse_finished,
                idempotency=idempotency(idempotency_key, parsed.canonical_json(), lane, metadata, webhook_url),
                traceparent=traceparent_of(span),
            )
            span.set_attribute("calotype.job_id", job_id)
        return JobHandle(self, job_id)

    def submit_many(
        self,
        configs: Iterable[Submission],
        *,
        lane: Lane = Lane.BULK,
        metadata: Mapping[str, Any] | None = None,
        tenant: str | None = None,
    ) -> list[JobHandle]:
        """Queue many jobs in few round trips. All are checked before the first is queued.

        Raises:
            InvalidRequest: its `field` names the index of the first invalid config; nothing was queued.
            QueueFull: the limit does not allow all of them, and nothing was queued. Only if other jobs come in
                between, and the queue stays full for a minute, some were queued: their ids are in `accepted`.
        """
        if isinstance(configs, (str, bytes, Mapping, GenerationConfig)) or not isinstance(configs, Iterable):
            raise InvalidRequest(
                f"{type(configs).__name__} is not a list of configs",
                field="configs",
                value=configs,
                remedy="put it into a list, or use `submit` for one job",
            )
        tenant = self._resolver.tenant(tenant)
        new = []
        for index, config in enumerate(configs):
            try:
                new.append(self._resolver.new_job(self._resolver.parse(config, {}), lane=lane, tenant=tenant))
            except InvalidRequest as error:
                raise type(error)(
                    error.problem, field=f"configs[{index}].{error.field}", value=error.value, remedy=error.remedy
                ) from error
        attributes = {"calotype.jobs": len(new), "calotype.lane": lane.value}
        with span_block(self._telemetry.tracer, "submit many", kind=SpanKind.PRODUCER, attributes=attributes) as span:
            traceparent = traceparent_of(span)
            ids = self._create_all(new, lane=lane, metadata=metadata, tenant=tenant, traceparent=traceparent)
        return [JobHandle(self, job_id) for job_id in ids]

    def _create_all(
        self,
        new: Sequence[NewJob],
        *,
        lane: Lane,
        metadata: Mapping[str, Any] | None,
        tenant: str,
        traceparent: str | None,
    ) -> list[str]:
        """Retries for a while if other jobs have filled the queue. Raises QueueFull."""
        ids: list[str] = []
        ends = self._clock() + _PATIENCE_SECONDS
        while len(ids) < len(new):
            try:
                ids += self._store.create(
                    new[len(ids) :],
                    lane=lane,
                    metadata=storable(metadata),
                    tenant=tenant,
                    reuse=self.settings.reuse_finished,
                    traceparent=traceparent,
                )
            except QueueFull as full:
                ids += full.accepted
                if not ids or self._clock() >= ends:
                    raise QueueFull(str(full), full.retry_after_seconds, accepted=ids) from full
                self._sleep(random.uniform(0.5, 1.0) * min(full.retry_after_seconds, _PAUSE_SECONDS))
        return ids

    def upload(self, image: ImageSource, *, field: str = "image") -> str:
        """Store an image for use as `init_image`, `mask_image` or a control; returns its id.

        Raises:
            InvalidRequest: not a PNG, JPEG or WebP image, or too large. Nothing was stored.
        """
        return self._resolver.upload(image, field=field)

    def jobs(
        self, *, state: JobState | None = None, limit: int = 50, tenant: str | None = None, after: str | None = None
    ) -> list[JobRecord]:
        """Jobs outside batches, newest first: of one tenant, or of all. `after` is the last one of the page before."""
        return self._store.jobs(state=state, limit=limit, tenant=tenant, after=after)

    def models(self) -> dict[str, ModelCard]:
        """Every model that a worker has ever announced."""
        return self._store.models()

    def workers(self) -> list[WorkerInfo]:
        """The workers alive now."""
        return self._store.workers()

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        return self._store.counts()

    def depths(self) -> dict[str, int]:
        """Jobs waiting in each queue."""
        return self._store.depths()

    def overview(self, *, tenant: str | None = None) -> Overview:
        """Queues, workers and their step batches. With `tenant`, only its own jobs are identified."""
        return look(self._store, tenant=tenant)

    def close(self) -> None:
        """Close the connections."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
