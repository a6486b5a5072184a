"""`Client`: the producer's door. Submits jobs, follows them and fetches their pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, overload

from calotype.handle import JobHandle
from calotype.picture import Picture, PictureSource, is_picture, picture_bytes
from calotype.waiting import Waiting
from calotype_shared.config import GenerationConfig, quality_preset
from calotype_shared.errors import InvalidRequest, JobCancelled, JobFailed, UnknownModel, WaitTimeout
from calotype_shared.jobs import JobRecord, JobState, Lane, Preview
from calotype_shared.model_card import ModelCard
from calotype_shared.settings import Settings, connect_redis
from calotype_shared.storage import Storage
from calotype_shared.store import JobStore
from calotype_shared.uploads import normalise, upload_key

if TYPE_CHECKING:
    from calotype_shared.worker_info import WorkerInfo

log = logging.getLogger(__name__)

Submission = GenerationConfig | str | Mapping[str, Any]  # a config, a bare prompt, or fields
JobIds = list[str] | tuple[str, ...]  # not Sequence: a str is one of those too

_CARDS_SECONDS = 5.0  # how long the models' cards are remembered
_WORKER_CHECK_SECONDS = 5.0  # between looks at whether anyone serves what is waited for


class Client:
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
    ) -> None:
        if settings is None:
            settings = Settings.load(redis_url=redis_url)
        elif redis_url is not None:
            settings = settings.model_copy(update={"redis_url": redis_url})
        self.settings = settings
        self._redis = connect_redis(settings)
        self._store = JobStore(
            self._redis, key_prefix=settings.key_prefix, retention_seconds=settings.retention_seconds
        )
        self._storage = Storage(settings)
        self._on_warning = on_warning
        self._clock = clock
        self._sleep = sleep
        self._cards: dict[str, ModelCard] = {}
        self._cards_until = float("-inf")
        self._uploaded: set[str] = set()  # ids known to be in storage

    def submit(
        self,
        config: Submission,
        *,
        lane: Lane = Lane.INTERACTIVE,
        metadata: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> JobHandle:
        """Queue one job. `config` is a config or a prompt; `fields` are any of `GenerationConfig`'s, and `quality`.

        Raises:
            InvalidRequest: a field is wrong; nothing was queued. `UnknownModel` if no worker ever announced the model.
        """
        resolved = self._resolved(config, fields)
        [job_id] = self._store.create([resolved], lane=lane, metadata=metadata)
        return JobHandle(self, job_id)

    def submit_many(
        self, configs: Iterable[Submission], *, lane: Lane = Lane.BULK, metadata: Mapping[str, Any] | None = None
    ) -> list[JobHandle]:
        """Queue many jobs in few round trips. All are checked before the first is queued.

        Raises:
            InvalidRequest: its `field` names the index of the first bad one; nothing was queued.
        """
        resolved = []
        for index, config in enumerate(configs):
            try:
                resolved.append(self._resolved(config, {}))
            except InvalidRequest as error:
                raise type(error)(
                    error.problem, field=f"configs[{index}].{error.field}", value=error.value, remedy=error.remedy
                ) from error
        return [JobHandle(self, job_id) for job_id in self._store.create(resolved, lane=lane, metadata=metadata)]

    def _resolved(self, config: Submission, fields: Mapping[str, Any]) -> GenerationConfig:
        """The complete config, checked against the model's card."""
        if isinstance(config, GenerationConfig) and not fields:
            parsed = config
        else:
            parsed = GenerationConfig.parse(self._with_uploads(_fields(config, fields)))
        resolved = parsed.resolved(self._card(parsed.model))
        for model in resolved.ensemble:
            self._card(model).check(resolved)
        if resolved.refiner is not None:
            self._card(resolved.refiner.model).check_as_refiner(resolved)
        self._check_together(resolved)
        self._check_uploads(resolved)
        return resolved

    def _check_together(self, config: GenerationConfig) -> None:
        """A job that uses several models goes to a worker that has them all."""
        wanted = set(config.models)
        if len(wanted) > 1 and not any(wanted <= served for served in self._store.served_together()):
            raise InvalidRequest(
                "no worker serves these models together",
                field="ensemble" if config.ensemble else "refiner",
                value=", ".join(config.models),
                remedy=f"start one: calotype worker {' '.join(f'--model {name}' for name in config.models)}",
            )

    def _check_uploads(self, config: GenerationConfig) -> None:
        for upload_id in config.uploads:
            if upload_id not in self._uploaded and not self._storage.exists(upload_key(upload_id)):
                raise InvalidRequest(
                    "no such upload", field="upload", value=upload_id, remedy="upload the picture first: Client.upload"
                )
            self._uploaded.add(upload_id)

    def upload(self, picture: PictureSource, *, field: str = "image") -> str:
        """Store a picture for use as `init_image`, `mask_image` or a control; returns its id.

        Raises:
            InvalidRequest: it is no PNG, JPEG or WebP, or too large. Nothing was stored.
        """
        upload_id, data = normalise(picture_bytes(picture, field), field=field)
        if upload_id not in self._uploaded:
            self._storage.put(upload_key(upload_id), data, "image/png")
            self._uploaded.add(upload_id)
        return upload_id

    def _with_uploads(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Pictures given in place of their ids are uploaded."""
        for name in ("init_image", "mask_image"):
            if is_picture(fields.get(name)):
                fields[name] = self.upload(fields[name], field=name)
        controls = fields.get("controls")
        if isinstance(controls, (list, tuple)):
            fields["controls"] = [
                {**control, "image": self.upload(control["image"], field="controls.image")}
                if isinstance(control, Mapping) and is_picture(control.get("image"))
                else control
                for control in controls
            ]
        return fields

    def _card(self, model: str) -> ModelCard:
        if model not in self._cards or self._clock() >= self._cards_until:
            self._cards = dict(self._store.models())
            self._cards_until = self._clock() + _CARDS_SECONDS
        card = self._cards.get(model)
        if card is None:
            known = f"use one of: {', '.join(sorted(self._cards))}; or start" if self._cards else "start"
            raise UnknownModel(
                "no worker has announced this model",
                field="model",
                value=model,
                remedy=f"{known} a worker for it: calotype worker --model {model}",
            )
        return card

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
        while True:
            yield from self.look(waiting)
            if waiting.done:
                return
            self._sleep(waiting.pause(self._clock()))

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
        changed = waiting.observe(window, self._store.get_many(window)) if window else []
        if waiting.expired(now):
            raise WaitTimeout(self._why_late(waiting))
        if not waiting.warned and now >= waiting.next_worker_check:
            waiting.next_worker_check = now + _WORKER_CHECK_SECONDS
            if unserved := self._unserved(waiting):
                waiting.warned = True
                self._on_warning(unserved)
        return changed

    def pause(self, waiting: Waiting) -> float:
        """Seconds to sleep before the next `look`."""
        return waiting.pause(self._clock())

    def _unserved(self, waiting: Waiting) -> str:
        """A sentence about queued jobs whose models no live worker serves; empty if there are none."""
        queued = {record.config.models for record in waiting.unfinished if record.state is JobState.QUEUED}
        if not queued:
            return ""
        served = [set(worker.models) for worker in self.workers()]
        missing = sorted(models for models in queued if not any(set(models) <= own for own in served))
        if not missing:
            return ""
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

    def images(self, job_id: str) -> list[Picture]:
        """Download the pictures of a finished job.

        Raises:
            JobFailed, JobCancelled: it has none.
            InvalidRequest: it is not finished yet.
        """
        return [
            Picture(job_id=job_id, index=index, ref=ref, data=self._storage.get(ref.key))
            for index, ref in enumerate(self._succeeded(job_id).images)
        ]

    def previews(self, job_id: str) -> list[Preview]:
        """The newest preview of each picture of a running job that was submitted with `preview_every`."""
        return self._store.previews(job_id)

    def follow_previews(self, job_id: str, *, timeout: float | None = None) -> Iterator[Preview]:
        """Each new preview of a job's pictures until it is final. Some may be skipped: only the newest is kept.

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
        """Links to the pictures that work without keys, for a while. Raises as `images`."""
        seconds = expires_seconds or self.settings.url_expires_seconds
        return [self._storage.presigned_url(ref.key, expires_seconds=seconds) for ref in self._succeeded(job_id).images]

    def _succeeded(self, job_id: str) -> JobRecord:
        record = self.status(job_id)
        if not record.state.final:
            raise InvalidRequest(
                f"the job is still {record.state.value} and has no pictures yet",
                field="job_id",
                value=job_id,
                remedy="wait for it first",
            )
        require_success(record)
        return record

    def jobs(self, *, state: JobState | None = None, limit: int = 50) -> list[JobRecord]:
        """Jobs, newest first."""
        return self._store.jobs(state=state, limit=limit)

    def models(self) -> dict[str, ModelCard]:
        """Every model that a worker has announced, served at the moment or not."""
        return self._store.models()

    def workers(self) -> list[WorkerInfo]:
        """The workers alive now."""
        return self._store.workers()

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        return self._store.counts()

    def close(self) -> None:
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_success(record: JobRecord) -> None:
    """Raise JobFailed or JobCancelled unless the job succeeded."""
    if record.state is JobState.FAILED:
        error = record.error
        reason = f"{error.code}: {error.message}" if error else "no reason was recorded"
        raise JobFailed(f"job {record.id} failed after {record.failures} attempt(s): {reason}")
    if record.state is JobState.CANCELLED:
        raise JobCancelled(f"job {record.id} was cancelled; submit it again if you want its pictures")


def _fields(config: Submission, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of fields: the config's own, then a quality preset's, then those given beside it."""
    if isinstance(config, GenerationConfig):
        base = config.model_dump()
    elif isinstance(config, str):
        base = {"prompt": config}
    else:
        base = dict(config)
    given = dict(fields)
    quality = given.pop("quality", base.pop("quality", None))
    if quality is None:
        return {**base, **given}
    preset = quality_preset(quality)
    if isinstance(config, Mapping):  # a field written beside the preset wins over it
        return {**preset, **base, **given}
    return {**base, **preset, **given}
