"""`JobReader`: queries about jobs. Nothing here changes a job."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from calotype_shared.errors import UnreadableRecord, no_such_job
from calotype_shared.queue.fleet import Fleet
from calotype_shared.queue.records import read_record
from calotype_shared.queue.scripts import said_clearly
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import JobRecord, Preview, created_us

log = logging.getLogger(__name__)

_FIRST_IN_LINE = 64  # jobs at the front of a queue whose waiting times are compared
_SWEEP_AT_MOST = 100


class JobReader(Fleet):
    """Every method raises RedisUnavailable when Redis cannot be reached."""

    @said_clearly
    def ping(self) -> None:
        """Raise RedisUnavailable unless Redis answers."""
        self._redis.ping()

    @said_clearly
    def get(self, job_id: str) -> JobRecord:
        """A job's record as it is now.

        Raises:
            JobNotFound: never created, or finished longer ago than records are kept.
            UnreadableRecord: damaged, or so new that not even its state is understood.
        """
        fields = self._redis.hgetall(self.keys.job(job_id))
        if not fields:
            raise no_such_job(job_id)
        return read_record(job_id, fields, schema=self.schema)  # type: ignore[arg-type]

    @said_clearly
    def submitted_before(self, idempotency_key: str, *, tenant: str) -> bool:
        """Whether this key names an earlier submission of the tenant."""
        return bool(self._redis.exists(self.keys.idempotency(tenant, idempotency_key)))

    @said_clearly
    def get_many(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """Records in one round trip; None where there is no record, or one that this version cannot read."""
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hgetall(self.keys.job(job_id))
        found = zip(job_ids, pipeline.execute(), strict=True)
        return [_or_none(job_id, fields, self.schema) for job_id, fields in found]

    @said_clearly
    def jobs(
        self, *, state: JobState | None = None, limit: int = 50, tenant: str | None = None, after: str | None = None
    ) -> list[JobRecord]:
        """The newest jobs first, of one state or of all, of one tenant or of all; without those of batches.

        `after` is the last job of the page before.
        """
        found: list[JobRecord] = []
        ids = self._newest(tenant, after)
        while len(found) < limit and (chunk := list(itertools.islice(ids, max(limit, 100)))):
            found += [r for r in self.get_many(chunk) if r is not None and state in (None, r.state)]
        return found[:limit]

    def _newest(self, tenant: str | None, after: str | None) -> Iterator[str]:
        """Ids of jobs by creation time, newest first."""
        tenants = [tenant] if tenant is not None else sorted(map(str, self._redis.smembers(self.keys.tenants)))
        before = "+inf"
        if after is not None:
            owner = self._redis.hget(self.keys.job(after), "tenant")
            score = self._redis.zscore(self.keys.recent(str(owner)), after)
            before = f"({created_us(after) if score is None else score:.0f}"
        by_tenant = [self._newest_of(name, before) for name in tenants]
        return (job_id for _, job_id in heapq.merge(*by_tenant, reverse=True))

    def _newest_of(self, tenant: str, before: str) -> Iterator[tuple[float, str]]:
        while True:
            page: list[tuple[str, float]] = self._redis.zrange(  # type: ignore[assignment]
                self.keys.recent(tenant), before, "-inf", desc=True, byscore=True, offset=0, num=100, withscores=True
            )
            for job_id, score in page:
                yield float(score), job_id
            if not page:
                return
            before = f"({float(page[-1][1]):.0f}"  # all times are distinct, see create.lua

    @said_clearly
    def counts(self) -> dict[JobState, int]:
        """Jobs by state: current numbers for queued and running, totals for the final states."""
        stored: dict[str, str] = self._redis.hgetall(self.keys.counts)  # type: ignore[assignment]
        return {state: int(stored.get(state.value, 0)) for state in JobState}

    @said_clearly
    def depths(self) -> dict[str, int]:
        """Jobs waiting in each queue."""
        queues = sorted(self._redis.smembers(self.keys.queues))
        pipeline = self._redis.pipeline(transaction=False)
        for queue in queues:
            pipeline.zcard(self.keys.waiting(str(queue)))
        return dict(zip(map(str, queues), pipeline.execute(), strict=True))

    @said_clearly
    def spare_messages(self, queue: str) -> int:
        """Messages of that queue that no worker has received yet."""
        return int(self._redis.llen(self.keys.messages(queue)))

    @said_clearly
    def oldest_waits(self) -> dict[str, float]:
        """For each queue with waiting jobs: the waiting time, in seconds, of the oldest job near the front.

        A tenant's oldest job is ahead of its others, so this is the oldest job of all unless very many tenants wait.
        """
        queues = sorted(map(str, self._redis.smembers(self.keys.queues)))
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.time()
        for queue in queues:
            pipeline.zrange(self.keys.waiting(queue), 0, _FIRST_IN_LINE - 1)
        (seconds, microseconds), *lines = pipeline.execute()
        for line in lines:
            for job_id in line:
                pipeline.hget(self.keys.job(str(job_id)), "queued_at")
        queued = iter(pipeline.execute())
        oldest = {
            queue: min((int(at) for at in itertools.islice(queued, len(line)) if at), default=None)
            for queue, line in zip(queues, lines, strict=True)
        }
        now = seconds * 1_000_000 + microseconds
        return {queue: max(0, now - at) / 1e6 for queue, at in oldest.items() if at is not None}

    @said_clearly
    def completion_rate(self) -> float | None:
        """Recent rate of finished jobs, per second; None if no worker has measured it."""
        per_second = self._redis.hget(self.keys.completion_rate, "per_second")
        return float(str(per_second)) if per_second else None

    @said_clearly
    def previews(self, job_id: str) -> list[Preview]:
        """The newest preview of each of a job's images that has one."""
        found: dict[str, str] = self._redis.hgetall(self.keys.preview(job_id))  # type: ignore[assignment]
        return sorted((Preview.model_validate_json(value) for value in found.values()), key=lambda p: p.index)

    @said_clearly
    def left_for_newer(self, queues: Iterable[str]) -> dict[str, int]:
        """The queues whose next job has a newer schema than this process knows, with its schema number.

        Workers skip such jobs and take the ones behind them, so this shows only if no others are left.
        """
        lines = list(queues)
        pipeline = self._redis.pipeline(transaction=False)
        for queue in lines:
            pipeline.zrange(self.keys.waiting(queue), 0, 0)
        heads = [(queue, found[0]) for queue, found in zip(lines, pipeline.execute(), strict=True) if found]
        for _, job_id in heads:
            pipeline.hget(self.keys.job(job_id), "schema")
        numbers = [int(found or 0) for found in pipeline.execute()]
        return {queue: number for (queue, _), number in zip(heads, numbers, strict=True) if number > self.schema}

    @said_clearly
    def dead(self, *, limit: int = 50, tenant: str | None = None) -> list[JobRecord]:
        """Dead jobs, newest first."""
        found: list[JobRecord] = []
        ids = iter(list(map(str, self._redis.zrevrange(self.keys.dead, 0, -1))))
        while len(found) < limit and (page := list(itertools.islice(ids, 100))):
            records = self.get_many(page)
            found += [r for r in records if r is not None and tenant in (None, r.tenant)]
            for job_id, record in zip(page, records, strict=True):
                if record is None and not self._redis.exists(self.keys.job(job_id)):
                    self._redis.zrem(self.keys.dead, job_id)  # its record has expired
        return found[:limit]

    @said_clearly
    def is_dead(self, job_id: str) -> bool:
        return self._redis.zscore(self.keys.dead, job_id) is not None

    @said_clearly
    def orphans(self, *, older_than_seconds: float) -> list[str]:
        """Storage folders of attempts that ended without a commit at least that long ago, oldest first."""
        seconds, microseconds = self._redis.time()
        before = seconds * 1000 + microseconds // 1000 - int(older_than_seconds * 1000)
        found = self._redis.zrange(self.keys.orphans, "-inf", before, byscore=True, offset=0, num=_SWEEP_AT_MOST)
        return list(map(str, found))


def _or_none(job_id: str, fields: Mapping[str, str], schema: int) -> JobRecord | None:
    if not fields:
        return None
    try:
        return read_record(job_id, fields, schema=schema)
    except UnreadableRecord as error:
        log.warning("record skipped", extra={"job_id": job_id, "reason": str(error)})
        return None
