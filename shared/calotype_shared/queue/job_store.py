"""`JobStore`: changes of jobs in Redis. Every change is one atomic script, by the server's clock."""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from calotype_shared.errors import IdempotencyConflict, UnreadableRecord, no_such_job
from calotype_shared.queue.job_reader import JobReader
from calotype_shared.queue.records import read_record
from calotype_shared.queue.scripts import said_clearly
from calotype_shared.queue.submission import Idempotency, NewJob, queue_full
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import ImageRef, JobError, JobRecord, Preview
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.storage.layout import attempt_folder

log = logging.getLogger(__name__)

_CHUNK = 200  # jobs per script call: enough to save round trips, few enough not to block the server
_PREVIEW_SECONDS = 60
_REAP_LOCK_MS = 1_000
_REAP_AT_MOST = 500
MAX_CRASHES = 5  # crashed workers after which a job fails
QUARANTINE_CRASHES = 2  # crashes after which a worker runs only one such job at a time
# Reapers run every few seconds. If none ran for this long, Redis was unavailable, and leases could not be renewed.
_SILENCE_MS, _GRACE_MS = 20_000, 10_000
_LOST = JobError(
    code="worker_lost",
    message=f"{MAX_CRASHES} workers died or disappeared while they ran this job; "
    "see its history with: calotype dead show ID",
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's right to a job. `attempt` and `token` are its fence token: writes with older ones are refused."""

    job_id: str
    attempt: int
    token: str
    record: JobRecord

    @property
    def folder(self) -> str:
        """The storage folder of this attempt's images; no other attempt uses it."""
        return attempt_folder(self.job_id, self.attempt, self.token)

    @property
    def config(self) -> ResolvedConfig:
        return self.record.config


@dataclass(frozen=True, kw_only=True)
class Reaped:
    """The result of a reaping: jobs queued again, jobs failed, and the number of replaced messages."""

    requeued: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    republished: int = 0


class News(NamedTuple):
    """`about` is the cancelled job's id, or the name of the queue that a job has entered."""

    kind: Literal["cancelled", "arrived"]
    about: str


class JobStore(JobReader):
    """All operations on jobs.

    Every method raises RedisUnavailable when Redis cannot be reached. Then nothing was done, or a call was done and
    only its response was lost, which the fence token makes safe to repeat.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        key_prefix: str = "calotype:",
        retention_seconds: float = 7 * 86_400.0,
        gap_seconds: float = 10.0,
        max_queued: int | None = None,
        max_queued_per_tenant: int | None = None,
    ) -> None:
        super().__init__(redis, key_prefix=key_prefix)
        self._limits = {"max_queued": max_queued, "max_queued_per_tenant": max_queued_per_tenant}
        self._retention = str(retention_seconds)
        self._gap_ms = str(int(gap_seconds * 1000))

    @said_clearly
    def put_preview(self, job_id: str, preview: Preview) -> None:
        """Store an image's newest preview for a minute. An attempt that lost its job can still write one."""
        pipeline = self._redis.pipeline()
        pipeline.hset(self.keys.preview(job_id), str(preview.index), preview.model_dump_json())
        pipeline.expire(self.keys.preview(job_id), _PREVIEW_SECONDS)
        pipeline.publish(self.keys.changed(job_id), "preview")
        pipeline.execute()

    # ---- submitting

    @said_clearly
    def create(
        self,
        jobs: Iterable[ResolvedConfig | NewJob],
        *,
        lane: Lane = Lane.BULK,
        tenant: str = "default",
        max_failures: int = 3,
        metadata: Mapping[str, Any] | None = None,
        webhook: str | None = None,
        reuse: bool = False,
        idempotency: Idempotency | None = None,
        traceparent: str | None = None,
    ) -> list[str]:
        """Accept jobs: write each record and push its message in one step. Returns ids in the order of the jobs.

        Jobs are accepted in steps of two hundred, and the first step only if the limit allows all of them.

        With `reuse`, a job can get the images of an equal finished job. `idempotency` is for a single job:
        if its key was used before, the id of that submission is returned and nothing is queued.

        Raises:
            IdempotencyConflict: the key was used before for a different request.
            QueueFull: the limit is reached; with the ids accepted so far, if other jobs came in between the steps.
        """
        common: dict[str, Any] = {
            **self._limits,
            "lane": lane.value,
            "tenant": tenant,
            "max_failures": str(max_failures),
            "metadata": json.dumps(dict(metadata or {})),
            "retention": self._retention,
            "webhook": webhook,
            "traceparent": traceparent,
            "reuse": reuse,
        }
        if idempotency is not None:
            common |= {"idempotency_key": idempotency.key, "request": idempotency.request}
        # The script distinguishes a missing value from null.
        common = {name: value for name, value in common.items() if value is not None}
        ids: list[str] = []
        new = [job if isinstance(job, NewJob) else NewJob.of(job, lane=lane) for job in jobs]
        for start in range(0, len(new), _CHUNK):
            chunk = new[start : start + _CHUNK]
            shared = json.dumps(common if start else {**common, "to_come": len(new)})
            answer = self._run("create", [shared, *itertools.chain.from_iterable(chunk)])
            if answer[0] == "full":
                raise queue_full(answer, coming=len(new) - start, accepted=ids)
            ids += [job.id for job in chunk] if answer[0] == "made" else [_accepted_before(answer, idempotency)]
        return ids

    @said_clearly
    def cancel(self, job_id: str) -> JobState:
        """Cancel a job immediately unless it is final; returns its state afterwards.

        Raises:
            JobNotFound: the job does not exist.
        """
        state = self._run("cancel", [job_id, self._retention])
        if state is None:
            raise no_such_job(job_id)
        return JobState(state)

    # ---- working

    @said_clearly
    def claim(
        self,
        *queues: str,
        worker: str,
        lease_seconds: float,
        leave_quarantined: bool = False,
        look: int = 0,
        shapes: Iterable[str] = (),
    ) -> Claim | None:
        """Take the next job by fair share, from the first of these queues with a waiting job; None if there is none.

        Prefers a job of one of these shapes ("WxH", in pixels) among the first `look` of the queue, unless a job ahead
        of it has been passed over `look` times.

        A job whose record cannot be read fails permanently. With `leave_quarantined`, jobs on which
        `QUARANTINE_CRASHES` workers have died stay in the queue.
        """
        most = QUARANTINE_CRASHES if leave_quarantined else MAX_CRASHES
        wanted = ",".join(shapes)
        while True:
            token = secrets.token_hex(4)
            arguments = [worker, int(lease_seconds * 1000), token, most, look if wanted else 0, wanted]
            found = self._run("claim", [*arguments, *queues])
            if found is None:
                return None
            job_id, values = found
            fields = dict(zip(values[::2], values[1::2], strict=True))
            try:
                record = read_record(job_id, fields, schema=self.schema)
            except UnreadableRecord as error:
                problem = JobError(code=error.code, message=str(error))
                log.warning("job cannot be read", extra={"job_id": job_id, "reason": str(error)})
                self._run("fail", [job_id, fields["attempt"], token, problem.model_dump_json(), 0, self._retention])
                continue
            return Claim(job_id=job_id, attempt=record.attempt, token=token, record=record)

    @said_clearly
    def push_message(self, queue: str) -> None:
        """Return a message that this worker has no slot for, unless there is already one per waiting job."""
        self._run("push_messages", [queue])

    @said_clearly
    def renew(self, claims: Iterable[Claim], *, lease_seconds: float) -> set[str]:
        """Renew leases; returns the ids of lost claims: cancelled, reaped, or finished by another attempt."""
        lost: set[str] = set()
        rest = iter(claims)
        while chunk := list(itertools.islice(rest, _CHUNK)):
            held = [value for claim in chunk for value in (claim.job_id, claim.attempt, claim.token)]
            lost |= set(self._run("renew", [int(lease_seconds * 1000), *held]))
        return lost

    @said_clearly
    def progress(self, updates: Iterable[tuple[Claim, int, int]]) -> None:
        """Record (claim, steps done, total steps). Lost claims write nothing."""
        values = [value for claim, *steps in updates for value in (claim.job_id, claim.attempt, claim.token, *steps)]
        if values:
            self._run("progress", values)

    @said_clearly
    def commit(self, claim: Claim, *, images: Sequence[ImageRef], timings: Mapping[str, float], steps: int = 0) -> bool:
        """Commit these images, made in so many steps. False if the claim was lost: then the images are not used."""
        shown = json.dumps([image.model_dump() for image in images])
        times = json.dumps({name: round(seconds, 6) for name, seconds in timings.items()})
        return bool(
            self._run("commit", [claim.job_id, claim.attempt, claim.token, shown, times, self._retention, steps])
        )

    @said_clearly
    def fail(self, claim: Claim, error: JobError, *, retry: bool) -> JobState | None:
        """Record a failed attempt. QUEUED if another attempt follows, FAILED if not, None if the claim was lost."""
        problem = error.model_dump_json()
        state = self._run("fail", [claim.job_id, claim.attempt, claim.token, problem, int(retry), self._retention])
        return JobState(state) if state else None

    @said_clearly
    def release(self, claim: Claim) -> bool:
        """Return an unfinished job to its queue position, without counting a failure."""
        return bool(self._run("release", [claim.job_id, claim.attempt, claim.token]))

    @said_clearly
    def reap(self, *, who: str = "") -> Reaped | None:
        """Queue jobs with expired leases again and replace lost messages; None while another worker does it."""
        problem = _LOST.model_dump_json()
        arguments = [who, _REAP_LOCK_MS, self._gap_ms, self._retention, problem, _REAP_AT_MOST]
        found = self._run("reap", [*arguments, MAX_CRASHES, _SILENCE_MS, _GRACE_MS])
        if found is None:
            return None
        requeued, failed, republished = found
        return Reaped(requeued=tuple(requeued), failed=tuple(failed), republished=republished)

    @said_clearly
    def swept(self, folders: Sequence[str]) -> None:
        """Remove these folders from the list of orphans."""
        if folders:
            self._redis.zrem(self.keys.orphans, *folders)

    @said_clearly
    def forget_dead(self, job_id: str) -> bool:
        """Remove a job from the list of dead jobs; its record stays until it expires. False if it was not listed."""
        return bool(self._redis.zrem(self.keys.dead, job_id))

    @contextmanager
    def news(self, *queues: str) -> Iterator[Callable[[float], News | None]]:
        """A subscription to events for workers: call the yielded function with the seconds to wait.

        Events are cancellations of running jobs, and arrivals of jobs in these interactive queues.
        """
        subscription = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        try:
            subscription.subscribe(self.keys.cancelled, *map(self.keys.arrived, queues))

            def wait(seconds: float) -> News | None:
                deadline = time.monotonic() + seconds
                while True:
                    # Also returns early, with None, on the confirmation of the subscription itself.
                    message = subscription.get_message(timeout=max(0.0, deadline - time.monotonic()))
                    if message:
                        cancelled = message["channel"] == self.keys.cancelled
                        return News("cancelled" if cancelled else "arrived", str(message["data"]))
                    if time.monotonic() >= deadline:
                        return None

            yield wait
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise self.unavailable(error) from error
        finally:
            subscription.close()


def _accepted_before(answer: Sequence[str], idempotency: Idempotency | None) -> str:
    """The id of the first submission with this idempotency key."""
    assert idempotency is not None
    _, job_id, request = answer
    if request != idempotency.request:
        raise IdempotencyConflict(
            "was used before for a different request",
            field="idempotency_key",
            value=idempotency.key,
            remedy="use a new key for a new request",
        )
    return job_id
