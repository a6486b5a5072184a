"""`Client`: the producer's door. Submits jobs, follows them and fetches their images."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, overload

from calotype.batches.client import BatchCalls
from calotype.batches.store import BatchStore
from calotype.dead import DeadCalls
from calotype.handle import JobHandle
from calotype.job_changes import JobChangeListener
from calotype.job_image import ImageSource, JobImage
from calotype.overview import Overview, look
from calotype.resolver import Resolver, Submission, idempotency, storable
from calotype.waiting import Waiting
from calotype_shared.errors import (
    InvalidRequest,
    JobCancelled,
    JobFailed,
    QueueFull,
    WaitTimeout,
)
from calotype_shared.observability.tracing import NOOP_TELEMETRY, Telemetry, make_telemetry
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord, Preview
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage

if TYPE_CHECKING:
    from calotype_shared.schema.worker_info import WorkerInfo

log = logging.getLogger(__name__)

JobIds = list[str] | tuple[str, ...]  # not Sequence: a str is one of those too

_PATIENCE_SECONDS = 60.0  # with a queue that fills up in the middle of a submission
_PAUSE_SECONDS = 5.0
_WORKER_CHECK_SECONDS = 5.0  # between looks at whether anyone serves what is waited for


class Client(BatchCalls, DeadCalls):
    """Talks to one Redis and one bucket; safe to share between threads. Connects on first use.

    ```python
    with Client() as client:  # CALOTYPE_REDIS_URL, CALOTYPE_S3_…
        job = client.submit("a red circle on a blue background", seed=7)
        job.images()[0].save("circle.png")
    ```

    Every call may raise `RedisUnavailable` or `StorageUnavailable`; nothing is then half-written.
    `on_warning` hears what a person should know while waiting, such as that no worker serves the model.
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
        self.settings = settings
        self._redis = connect_redis(settings)
        self._store = JobStore(
            self._redis,
            key_prefix=settings.key_prefix,
            retention_seconds=settings.retention_seconds,
            max_queued=settings.max_queued,
            max_queued_per_tenant=settings.max_queued_per_tenant,
        )
        self._storage = Storage(settings)
        self._on_warning = on_warning
        self._clock = clock
        self._sleep = sleep
        self._own_telemetry = (
            make_telemetry(settings, service="calotype-client") if telemetry is None else NOOP_TELEMETRY
        )
        self._telemetry = telemetry or self._own_telemetry
        self._batches = BatchStore(
            self._redis,
            key_prefix=settings.key_prefix,
            retention_seconds=settings.retention_seconds,
            max_open=settings.max_open_batches,
            max_open_per_tenant=settings.max_open_batches_per_tenant,
        )
        self._resolver = Resolver(settings, self._store, self._storage, clock=clock)
        self.job_changes = JobChangeListener(self._redis, self._store.keys)

    def submit(
        self,
        config: Submission,
        *,
        lane: Lane = Lane.INTERACTIVE,
        metadata: Mapping[str, Any] | None = None,
        tenant: str | None = None,
        idempotency_key: str | None = None,
        webhook_url: str | None = None,
        **fields: Any,
    ) -> JobHandle:
        """Queue one job. `config` is a config or a prompt; `fields` are any of `GenerationConfig`'s, and `quality`.

        A second submission with the same `idempotency_key` gets the first one's job. `webhook_url` is told when the
        job is final.

        Raises:
            InvalidRequest: a field is wrong; nothing was queued. `UnknownModel` if no worker ever announced the model,
                `IdempotencyConflict` if the key was used for another request.
            QueueFull: too many jobs wait; its `retry_after_seconds` is when to come again. Nothing was queued.
        """
        tenant = self._resolver.tenant(tenant)
        parsed = self._resolver.parse(config, fields)
        with self._telemetry.begin("submit", kind="producer", model=parsed.model, lane=lane.value) as span:
            [job_id] = self._store.create(
                [self._resolver.new_job(parsed, lane=lane, tenant=tenant)],
                lane=lane,
                metadata=storable(metadata),
                tenant=tenant,
                webhook=self._resolver.webhook(webhook_url),
                reuse=self.settings.reuse_finished,
                idempotency=idempotency(idempotency_key, parsed.canonical_json(), lane, metadata, webhook_url),
                traceparent=span.traceparent,
            )
            span.set(job_id=job_id)
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
            InvalidRequest: its `field` names the index of the first bad one; nothing was queued.
            QueueFull: there is no room for all of them, and nothing was queued. Only if others take that room
                meanwhile, and it stays so for a minute, some were: their ids are in its `accepted`.
        """
        tenant = self._resolver.tenant(tenant)
        new = []
        for index, config in enumerate(configs):
            try:
                new.append(self._resolver.new_job(self._resolver.parse(config, {}), lane=lane, tenant=tenant))
            except InvalidRequest as error:
                raise type(error)(
                    error.problem, field=f"configs[{index}].{error.field}", value=error.value, remedy=error.remedy
                ) from error
        with self._telemetry.begin("submit many", kind="producer", jobs=len(new), lane=lane.value) as span:
            ids = self._create_all(new, lane=lane, metadata=metadata, tenant=tenant, traceparent=span.traceparent)
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
        """Again, for a while, where others have taken the room. Raises QueueFull."""
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
            InvalidRequest: it is no PNG, JPEG or WebP, or too large. Nothing was stored.
        """
        return self._resolver.upload(image, field=field)

    def status(self, job_id: str) -> JobRecord:
        """The job as it is now. Raises JobNotFound."""
        return self._store.get(job_id)

    def follow(self, job_ids: Sequence[str], *, timeout: float | None = None) -> Iterator[JobRecord]:
        """Yield each job's record now and whenever it has changed, until all are final.

        Raises:
            JobNotFound: a job has no record.
            WaitTimeout: after `timeout` seconds; the jobs go on.
        """
        waiting = self.begin_wait(job_ids, timeout=timeout)
        with self.job_changes.watch() as watch:
            while True:
                yield from self.look(waiting)
                if waiting.done:
                    return
                watch.set_jobs(waiting.subscribed_ids)
                watch.wait(waiting.pause(self._clock(), live=watch.live), at_least=waiting.min_interval)

    @overload
    def wait(self, job_ids: str, timeout: float | None = None, *, check: bool = True) -> JobRecord: ...
    @overload
    def wait(self, job_ids: JobIds, timeout: float | None = None, *, check: bool = True) -> list[JobRecord]: ...
    def wait(
        self, job_ids: str | JobIds, timeout: float | None = None, *, check: bool = True
    ) -> JobRecord | list[JobRecord]:
        """Wait until the job, or all of the jobs, are final; returns the record or records, in order.

        Raises:
            JobFailed, JobCancelled: for the first job that did not succeed, once all are final, unless `check=False`.
            JobNotFound, WaitTimeout: as `follow`.
        """
        ids = [job_ids] if isinstance(job_ids, str) else list(job_ids)
        final = {}
        for record in self.follow(ids, timeout=timeout):
            if record.state.final:
                final[record.id] = record
        records = [final[job_id] for job_id in ids]
        if check:
            for record in records:
                require_success(record)
        return records[0] if isinstance(job_ids, str) else records

    def begin_wait(self, job_ids: Sequence[str], *, timeout: float | None = None) -> Waiting:
        """The state of a new wait, for a loop that does its own sleeping between calls of `look`."""
        return Waiting(list(job_ids), started=self._clock(), timeout=timeout)

    def look(self, waiting: Waiting) -> list[JobRecord]:
        """One round trip of a wait: the records that changed. Raises as `follow`."""
        now = self._clock()
        window = waiting.window
        changed = waiting.update(window, self._store.get_many(window)) if window else []
        if waiting.expired(now):
            raise WaitTimeout(self._why_late(waiting))
        if not waiting.warned and now >= waiting.next_worker_check:
            waiting.next_worker_check = now + _WORKER_CHECK_SECONDS
            if unserved := self._unserved(waiting):
                waiting.warned = True
                self._on_warning(unserved)
        return changed

    def pause(self, waiting: Waiting, *, live: bool = False) -> float:
        """Seconds to sleep before the next `look`; `live` as for `Waiting.pause`."""
        return waiting.pause(self._clock(), live=live)

    def _unserved(self, waiting: Waiting) -> str:
        """A sentence about queued jobs whose models no live worker serves; empty if there are none."""
        queued = {(r.config.models, r.schema_number) for r in waiting.unfinished if r.state is JobState.QUEUED}
        if not queued:
            return ""
        served = [(set(worker.models), worker.schema_number) for worker in self.workers()]
        missing = sorted(models for models, _ in queued if not any(set(models) <= own for own, _ in served))
        if not missing:
            newest = {models: max((known for own, known in served if set(models) <= own)) for models, _ in queued}
            too_new = sorted(models for models, number in queued if number > newest[models])
            if not too_new:
                return ""
            return (
                f"every live worker of {'+'.join(too_new[0])!r} is of an older version than the job: it stays queued "
                "until one of a newer version is there; upgrade the workers"
            )
        return (
            f"no live worker serves {', '.join(repr('+'.join(models)) for models in missing)}: the job stays queued "
            f"until one does; start one with: calotype worker {' '.join(f'--model {name}' for name in missing[0])}"
        )

    def _why_late(self, waiting: Waiting) -> str:
        left = waiting.unfinished
        states = ", ".join(f"{record.id} is {record.state.value} ({record.progress:.0%})" for record in left[:3])
        advice = self._unserved(waiting) or "wait longer, or cancel"
        return f"{waiting.unfinished_count} job(s) not finished after {waiting.timeout:g} s: {states}; {advice}"

    def cancel(self, job_id: str) -> JobState:
        """Cancel it, at once and for good; returns `cancelled`, or the final state it had already reached."""
        return self._store.cancel(job_id)

    def images(self, job_id: str) -> list[JobImage]:
        """Download the images of a finished job.

        Raises:
            JobFailed, JobCancelled: it has none.
            InvalidRequest: it is not finished yet.
        """
        return [
            JobImage(job_id=job_id, index=index, ref=ref, data=self._storage.get(ref.key))
            for index, ref in enumerate(self._succeeded(job_id).images)
        ]

    def previews(self, job_id: str) -> list[Preview]:
        """The newest preview of each image of a running job that was submitted with `preview_every`."""
        return self._store.previews(job_id)

    def follow_previews(self, job_id: str, *, timeout: float | None = None) -> Iterator[Preview]:
        """Each new preview of a job's images until it is final. Some may be skipped: only the newest is kept.

        Raises:
            JobNotFound, WaitTimeout: as `follow`.
        """
        seen: dict[int, tuple[int, int]] = {}
        for record in self.follow([job_id], timeout=timeout):
            for preview in self._store.previews(record.id):
                if seen.get(preview.index) != (preview.attempt, preview.step):
                    seen[preview.index] = (preview.attempt, preview.step)
                    yield preview

    def urls(self, job_id: str, *, expires_seconds: int | None = None) -> list[str]:
        """Links to the images that work without keys, for a while. Raises as `images`."""
        seconds = expires_seconds or self.settings.url_expires_seconds
        return [self._storage.presigned_url(ref.key, expires_seconds=seconds) for ref in self._succeeded(job_id).images]

    def _succeeded(self, job_id: str) -> JobRecord:
        record = self.status(job_id)
        if not record.state.final:
            raise InvalidRequest(
                f"the job is still {record.state.value} and has no images yet",
                field="job_id",
                value=job_id,
                remedy="wait for it first",
            )
        require_success(record)
        return record

    def jobs(
        self, *, state: JobState | None = None, limit: int = 50, tenant: str | None = None, after: str | None = None
    ) -> list[JobRecord]:
        """Jobs outside batches, newest first: of one tenant, or of all. `after` is the last one of the page before."""
        return self._store.jobs(state=state, limit=limit, tenant=tenant, after=after)

    def models(self) -> dict[str, ModelCard]:
        """Every model that a worker has announced, served at the moment or not."""
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
        """Queues, workers and what they work on. With `tenant`, only its own jobs are told apart."""
        return look(self._store, tenant=tenant)

    def close(self) -> None:
        self.job_changes.close()
        self._redis.close()
        self._own_telemetry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_success(record: JobRecord) -> None:
    """Raise JobFailed or JobCancelled unless the job succeeded."""
    if record.state is JobState.FAILED:
        error = record.error
        reason = f"{error.code}: {error.message}" if error else "no reason was recorded"
        raise JobFailed(f"job {record.id} failed after {record.attempt} attempt(s): {reason}")
    if record.state is JobState.CANCELLED:
        raise JobCancelled(f"job {record.id} was cancelled; submit it again if you want its images")
