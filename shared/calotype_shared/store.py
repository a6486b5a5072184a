"""`JobStore`: jobs in Redis. Every change of a job is one atomic script, and all time is the server's."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from redis import Redis
from redis.exceptions import AuthenticationError, ReadOnlyError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from calotype_shared.broker import envelope_template
from calotype_shared.config import GenerationConfig
from calotype_shared.errors import InvalidRequest, JobNotFound, RedisUnavailable
from calotype_shared.jobs import ImageRef, JobError, JobRecord, JobState, Lane, Preview, new_job_id
from calotype_shared.keys import Keys, queue_name, together
from calotype_shared.model_card import ModelCard
from calotype_shared.records import UnreadableRecord, read_record
from calotype_shared.scripts import script_source
from calotype_shared.worker_info import WorkerInfo

log = logging.getLogger(__name__)

_CHUNK = 200  # jobs a script call: long enough to save round trips, short enough not to hold the server up
_PREVIEW_SECONDS = 60
_REAP_LOCK_MS = 1_000
_REAP_AT_MOST = 500
_LOST = JobError(code="worker_lost", message="the worker stopped without a word on every attempt at this job")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's right to a job. `attempt` is the fence token: writes with an older one are refused."""

    job_id: str
    attempt: int
    record: JobRecord

    @property
    def config(self) -> GenerationConfig:
        return self.record.config


@dataclass(frozen=True, kw_only=True)
class Reaped:
    """What a reaping did: jobs queued again, jobs given up, jobs whose message had been lost."""

    requeued: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    republished: tuple[str, ...] = ()


def _said_clearly(method: Callable[Concatenate[JobStore, P], R]) -> Callable[Concatenate[JobStore, P], R]:
    """Turns Redis' connection errors into RedisUnavailable, which says where and what to do."""

    @functools.wraps(method)
    def wrapped(self: JobStore, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except (RedisConnectionError, RedisTimeoutError, ReadOnlyError) as error:
            raise self._unavailable(error) from error

    return wrapped  # type: ignore[return-value]  # mypy names the first argument, nothing else differs


class JobStore:
    """All operations on jobs. Thread-safe, as its Redis client is.

    Every method raises RedisUnavailable when Redis cannot be reached; then nothing was done, or a commit-like call
    may have been done unseen, which its fence makes safe to repeat.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        key_prefix: str = "calotype:",
        retention_seconds: float = 7 * 86_400.0,
        gap_seconds: float = 10.0,
    ) -> None:
        self._redis = redis
        self.keys = Keys(key_prefix)
        self._retention = str(retention_seconds)
        self._gap_ms = str(int(gap_seconds * 1000))
        self._template = envelope_template()
        names = ("create", "claim", "renew", "progress", "commit", "fail", "release", "cancel", "reap")
        self._scripts = {name: redis.register_script(script_source(name)) for name in names}

    # ---- previews

    @_said_clearly
    def put_preview(self, job_id: str, preview: Preview) -> None:
        """Keep a picture's newest preview, for a minute. An attempt that lost its job may still write one."""
        pipeline = self._redis.pipeline()
        pipeline.hset(self.keys.preview(job_id), str(preview.index), preview.model_dump_json())
        pipeline.expire(self.keys.preview(job_id), _PREVIEW_SECONDS)
        pipeline.execute()

    @_said_clearly
    def previews(self, job_id: str) -> list[Preview]:
        """The newest preview of each of a job's pictures that has one."""
        found: dict[str, str] = self._redis.hgetall(self.keys.preview(job_id))  # type: ignore[assignment]
        return sorted((Preview.model_validate_json(value) for value in found.values()), key=lambda p: p.index)

    # ---- submitting

    @_said_clearly
    def create(
        self,
        configs: Iterable[GenerationConfig],
        *,
        lane: Lane = Lane.BULK,
        max_failures: int = 3,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Accept jobs: each record is written and its message pushed in one step. Ids in the order of the configs.

        Raises:
            InvalidRequest: a config is not resolved (`GenerationConfig.resolved`).
        """
        common = [lane.value, str(max_failures), json.dumps(dict(metadata or {})), self._template]
        ids: list[str] = []
        # Neighbours of one queue share a script call.
        for models, group in itertools.groupby(configs, key=lambda config: config.models):
            queue = queue_name(models, lane)
            while chunk := list(itertools.islice(group, _CHUNK)):
                arguments = [queue, *common]
                for config in chunk:
                    if config.seed is None or config.width is None or config.height is None:
                        raise InvalidRequest(
                            "seed, width or height is still open",
                            field="config",
                            value=config,
                            remedy="resolve it against the model's card first",
                        )
                    job_id = new_job_id()
                    ids.append(job_id)
                    arguments += [job_id, config.canonical_json(), config.digest()]
                self._run("create", arguments)
        return ids

    @_said_clearly
    def cancel(self, job_id: str) -> JobState:
        """End a job at once unless it is final already; returns the state it has then.

        Raises:
            JobNotFound: there is no such job.
        """
        state = self._run("cancel", [job_id, self._retention])
        if state is None:
            raise _not_found(job_id)
        return JobState(state)

    # ---- working

    @_said_clearly
    def claim(self, job_id: str, *, worker: str, lease_seconds: float) -> Claim | None:
        """Take a queued job; None if it is not there to be taken, and its message can be dropped."""
        fields = self._run("claim", [job_id, worker, int(lease_seconds * 1000)])
        if fields is None:
            return None
        record = read_record(job_id, dict(zip(fields[::2], fields[1::2], strict=True)))
        return Claim(job_id=job_id, attempt=record.attempt, record=record)

    @_said_clearly
    def renew(self, claims: Iterable[Claim], *, lease_seconds: float) -> set[str]:
        """Lengthen leases; returns the ids that were lost: cancelled, reaped, or finished by another attempt."""
        pairs = [value for claim in claims for value in (claim.job_id, claim.attempt)]
        return set(self._run("renew", [int(lease_seconds * 1000), *pairs])) if pairs else set()

    @_said_clearly
    def progress(self, updates: Iterable[tuple[Claim, int, int]]) -> None:
        """Note (claim, steps done, steps in total). Claims that were lost write nothing."""
        values = [value for claim, step, total in updates for value in (claim.job_id, claim.attempt, step, total)]
        if values:
            self._run("progress", values)

    @_said_clearly
    def commit(self, claim: Claim, *, images: Sequence[ImageRef], timings: Mapping[str, float]) -> bool:
        """The job succeeded with these pictures. False if the claim was lost: then they are nobody's."""
        shown = json.dumps([image.model_dump() for image in images])
        times = json.dumps({name: round(seconds, 6) for name, seconds in timings.items()})
        return bool(self._run("commit", [claim.job_id, claim.attempt, shown, times, self._retention]))

    @_said_clearly
    def fail(self, claim: Claim, error: JobError, *, retry: bool) -> JobState | None:
        """The attempt failed. QUEUED if another follows (`retry` and failures left), FAILED if not, None if lost."""
        arguments = [claim.job_id, claim.attempt, error.model_dump_json(), int(retry), self._retention, self._template]
        state = self._run("fail", arguments)
        return JobState(state) if state else None

    @_said_clearly
    def release(self, claim: Claim) -> bool:
        """Hand a job back unfinished, to the front of its line, without counting a failure."""
        return bool(self._run("release", [claim.job_id, claim.attempt, self._template]))

    @_said_clearly
    def reap(self, *, who: str = "") -> Reaped | None:
        """Re-queue jobs whose lease ended and republish lost messages; None while another worker does it."""
        arguments = [who, _REAP_LOCK_MS, self._gap_ms, self._retention, self._template]
        found = self._run("reap", [*arguments, _LOST.model_dump_json(), _REAP_AT_MOST])
        if found is None:
            return None
        requeued, failed, republished = (tuple(ids) for ids in found)
        return Reaped(requeued=requeued, failed=failed, republished=republished)

    @contextmanager
    def cancellations(self) -> Iterator[Callable[[float], str | None]]:
        """A subscription to jobs cancelled while running: call it with seconds to wait, get an id or None."""
        subscription = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        try:
            subscription.subscribe(self.keys.cancelled)

            def wait(seconds: float) -> str | None:
                deadline = time.monotonic() + seconds
                while True:
                    # Also returns early, with None, on the confirmation of the subscription itself.
                    message = subscription.get_message(timeout=max(0.0, deadline - time.monotonic()))
                    if message or time.monotonic() >= deadline:
                        return str(message["data"]) if message else None

            yield wait
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise self._unavailable(error) from error
        finally:
            subscription.close()

    # ---- looking

    @_said_clearly
    def ping(self) -> None:
        """Raise RedisUnavailable unless Redis answers."""
        self._redis.ping()

    @_said_clearly
    def get(self, job_id: str) -> JobRecord:
        """A job's record as it is now.

        Raises:
            JobNotFound: never created, or finished longer ago than records are kept.
            UnreadableRecord: written by a newer version.
        """
        fields = self._redis.hgetall(self.keys.job(job_id))
        if not fields:
            raise _not_found(job_id)
        return read_record(job_id, fields)  # type: ignore[arg-type]

    @_said_clearly
    def get_many(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """Records in one round trip; None where there is none, or none that this version can read."""
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hgetall(self.keys.job(job_id))
        return [_or_none(job_id, fields) for job_id, fields in zip(job_ids, pipeline.execute(), strict=True)]

    @_said_clearly
    def jobs(self, *, state: JobState | None = None, limit: int = 50) -> list[JobRecord]:
        """The newest jobs first, of one state or of all."""
        found: list[JobRecord] = []
        page = max(limit, 100)
        for start in itertools.count(0, page):
            ids: list[str] = self._redis.zrange(self.keys.recent, start, start + page - 1, desc=True)  # type: ignore[assignment]
            found += [r for r in self.get_many(ids) if r is not None and state in (None, r.state)]
            if len(ids) < page or len(found) >= limit:
                return found[:limit]
        return found

    @_said_clearly
    def counts(self) -> dict[JobState, int]:
        """Jobs by state: at this moment for queued and running, ever for the final ones."""
        stored: dict[str, str] = self._redis.hgetall(self.keys.counts)  # type: ignore[assignment]
        return {state: int(stored.get(state.value, 0)) for state in JobState}

    @_said_clearly
    def depths(self) -> dict[str, int]:
        """Jobs waiting in each queue."""
        queues = sorted(self._redis.smembers(self.keys.queues))
        pipeline = self._redis.pipeline(transaction=False)
        for queue in queues:
            pipeline.zcard(self.keys.waiting(str(queue)))
        return dict(zip(map(str, queues), pipeline.execute(), strict=True))

    # ---- models and workers

    @_said_clearly
    def announce_model(self, card: ModelCard) -> None:
        """Tell producers what a model can do. Stays when the last worker leaves: jobs may wait for the next."""
        self._redis.hset(self.keys.models, card.name, card.model_dump_json())

    @_said_clearly
    def models(self) -> dict[str, ModelCard]:
        """Every model that a worker ever announced, by name."""
        cards: dict[str, str] = self._redis.hgetall(self.keys.models)  # type: ignore[assignment]
        return {name: ModelCard.model_validate_json(card) for name, card in sorted(cards.items())}

    @_said_clearly
    def announce_together(self, models: Iterable[str]) -> None:
        """Tell producers that one worker serves all of these, so that one job may use several."""
        self._redis.sadd(self.keys.together, together(models))

    @_said_clearly
    def served_together(self) -> list[frozenset[str]]:
        """Every set of models that a worker ever served."""
        return [frozenset(str(names).split("+")) for names in self._redis.smembers(self.keys.together)]

    @_said_clearly
    def announce_worker(self, info: WorkerInfo, *, ttl_seconds: float) -> None:
        """A live worker's report; it is forgotten after `ttl_seconds` unless renewed."""
        pipeline = self._redis.pipeline()
        pipeline.set(self.keys.worker(info.name), info.model_dump_json(), px=int(ttl_seconds * 1000))
        pipeline.sadd(self.keys.workers, info.name)
        pipeline.execute()

    @_said_clearly
    def retire_worker(self, name: str) -> None:
        pipeline = self._redis.pipeline()
        pipeline.delete(self.keys.worker(name))
        pipeline.srem(self.keys.workers, name)
        pipeline.execute()

    @_said_clearly
    def workers(self) -> list[WorkerInfo]:
        """Live workers, by name."""
        names = sorted(map(str, self._redis.smembers(self.keys.workers)))
        if not names:
            return []
        reports = self._redis.mget([self.keys.worker(name) for name in names])
        gone = [name for name, report in zip(names, reports, strict=True) if report is None]
        if gone:
            self._redis.srem(self.keys.workers, *gone)
        return [WorkerInfo.model_validate_json(report) for report in reports if report is not None]

    # ----

    def _run(self, name: str, arguments: Sequence[object]) -> Any:
        return self._scripts[name](keys=[self.keys.prefix], args=list(arguments))  # type: ignore[arg-type]

    def _unavailable(self, error: RedisError) -> RedisUnavailable:
        options = self._redis.connection_pool.connection_kwargs
        where = options.get("path") or f"{options.get('host')}:{options.get('port')}"
        remedy = (
            "check the user and password in CALOTYPE_REDIS_URL"
            if isinstance(error, AuthenticationError)
            else "start Redis there, or point CALOTYPE_REDIS_URL at it"
        )
        return RedisUnavailable(f"Redis at {where} cannot be used ({error}); {remedy}")


def _or_none(job_id: str, fields: Mapping[str, str]) -> JobRecord | None:
    if not fields:
        return None
    try:
        return read_record(job_id, fields)
    except UnreadableRecord as error:
        log.warning("record skipped", extra={"job_id": job_id, "reason": str(error)})
        return None


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(
        f"job {job_id!r} is not known: it was never submitted here, or its record has expired; "
        "check the id and the Redis address"
    )
