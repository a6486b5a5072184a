"""`BatchStore`: batches in Redis. Every write of a dispatcher carries its fence and is refused if it was replaced."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence

from redis import Redis

from calotype.batches.record import BatchRecord, BatchState
from calotype_shared.errors import BatchNotFound, IdempotencyConflict, QueueFull, UnreadableRecord, no_such_batch
from calotype_shared.queue.scripts import Scripted, said_clearly
from calotype_shared.queue.submission import Idempotency, NewJob

log = logging.getLogger(__name__)

_RETRY_SECONDS = 60.0  # batches take long


class LeadLost(Exception):
    """Another dispatcher leads this batch now, or its state has changed: read it again."""


class BatchStore(Scripted):
    """Every method raises RedisUnavailable when Redis cannot be reached; then repeating it is safe."""

    def __init__(
        self,
        redis: Redis,
        *,
        key_prefix: str,
        retention_seconds: float,
        max_open: int = 1_000,
        max_open_per_tenant: int = 100,
    ) -> None:
        super().__init__(redis, key_prefix=key_prefix)
        self._retention = str(retention_seconds)
        self._limits = (max_open, max_open_per_tenant)
        self._newer: set[str] = set()  # batches that this version cannot lead, already logged

    # ---- for clients

    @said_clearly
    def create(
        self, batch_id: str, *, tenant: str, fields: Mapping[str, str], idempotency: Idempotency | None = None
    ) -> str:
        """Accept a batch whose manifest is in storage. Returns its id, or the id for which the key was used first.

        Raises:
            IdempotencyConflict: the key was used for something else.
            QueueFull: as many batches are open as may be.
        """
        key, request = idempotency or ("", "")
        values = itertools.chain.from_iterable(fields.items())
        answer = self._run("batch_create", [batch_id, tenant, self._retention, *self._limits, key, request, *values])
        if answer[0] == "full":
            raise _full(*answer[1:])
        found, asked = answer
        if asked != request:
            raise IdempotencyConflict(
                "was used before for a different request",
                field="idempotency_key",
                value=key,
                remedy="use a new key for a new request",
            )
        return str(found)

    @said_clearly
    def get(self, batch_id: str) -> BatchRecord:
        """The batch as it is now, in one round trip.

        Raises:
            BatchNotFound: never submitted, or finished longer ago than records are kept.
        """
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hgetall(self.keys.batch(batch_id))
        pipeline.time()
        fields, (seconds, microseconds) = pipeline.execute()
        if not fields:
            raise no_such_batch(batch_id)
        return BatchRecord.read(batch_id, fields, now=seconds + microseconds / 1e6)

    @said_clearly
    def newest(self, *, tenant: str, limit: int = 20, after: str | None = None) -> list[BatchRecord]:
        """A tenant's batches, newest first; `after` is the last one of the page before."""
        key, before = self.keys.batches(tenant), "+inf"
        if after is not None:
            score = self._redis.zscore(key, after)
            before = f"({score:.0f}" if score is not None else "-inf"
        found: list[BatchRecord] = []
        while len(found) < limit:
            page: list[tuple[str, float]] = self._redis.zrange(  # type: ignore[assignment]
                key, before, "-inf", desc=True, byscore=True, offset=0, num=limit, withscores=True
            )
            if not page:
                break
            for batch_id, score in page:
                before = f"({score:.0f}"
                try:
                    found.append(self.get(batch_id))
                except BatchNotFound:
                    self._redis.zrem(key, batch_id)  # its record has expired
                except UnreadableRecord as error:
                    log.warning("record skipped", extra={"batch_id": batch_id, "reason": str(error)})
        return found[:limit]

    @said_clearly
    def cancel(self, batch_id: str) -> None:
        """Cancel a batch: no new job starts. Raises BatchNotFound."""
        if self._run("batch_cancel", [batch_id]) is None:
            self.get(batch_id)  # raises

    @said_clearly
    def pause(self, batch_id: str, *, paused: bool) -> None:
        """Pause or resume queueing jobs. Queued jobs still run. Raises BatchNotFound."""
        self.get(batch_id)
        if paused:
            self._redis.hset(self.keys.batch(batch_id), "paused", "1")
        else:
            self._redis.hdel(self.keys.batch(batch_id), "paused")

    @said_clearly
    def live(self, batch_id: str) -> list[str]:
        """Its jobs that are queued or running."""
        return sorted(map(str, self._redis.smembers(self.keys.live(batch_id))))

    @said_clearly
    def parts(self, batch_id: str) -> list[str]:
        """Storage keys of the results written so far."""
        return list(map(str, self._redis.lrange(self.keys.parts(batch_id), 0, -1)))

    # ---- for dispatchers

    @said_clearly
    def open(self) -> list[tuple[str, str]]:
        """Ids and tenants of batches that are not final, oldest first."""
        ids = list(map(str, self._redis.zrange(self.keys.open_batches, 0, -1)))
        pipeline = self._redis.pipeline(transaction=False)
        for batch_id in ids:
            pipeline.hget(self.keys.batch(batch_id), "tenant")
        return [(batch_id, str(tenant)) for batch_id, tenant in zip(ids, pipeline.execute(), strict=True)]

    @said_clearly
    def lead(self, batch_id: str, *, who: str, lease_seconds: float) -> BatchRecord | None:
        """Take the lead of a batch, or keep it; None if another dispatcher has it, the batch is final, or too new."""
        answer = self._run("batch_lead", [batch_id, who, int(lease_seconds * 1000)])
        if answer is None:
            return None
        if isinstance(answer, str):
            if batch_id not in self._newer:
                log.warning("batch waits for a newer dispatcher", extra={"batch_id": batch_id, "schema": answer})
                self._newer.add(batch_id)
            return None
        fields = dict(zip(answer[::2], answer[1::2], strict=True))
        seconds, microseconds = self._redis.time()
        return BatchRecord.read(batch_id, fields, now=seconds + microseconds / 1e6)

    @said_clearly
    def resign(self, batch_id: str, *, who: str) -> None:
        """Give up the lead, so that another dispatcher can take over immediately."""
        if self._redis.get(self.keys.leader(batch_id)) == who:
            self._redis.delete(self.keys.leader(batch_id))

    @said_clearly
    def move(self, batch: BatchRecord, to: BatchState, fields: Mapping[str, str] | None = None) -> None:
        """Change its state and set fields along. Raises LeadLost."""
        values = itertools.chain.from_iterable((fields or {}).items())
        arguments = [batch.id, batch.fence, batch.state.value, to.value, self._retention, *values]
        if not self._run("batch_move", arguments):
            raise LeadLost(batch.id)

    @said_clearly
    def dispatch(self, batch: BatchRecord, jobs: Sequence[NewJob], *, start: str, end: str) -> None:
        """Send jobs into the queue and move the cursor from `start` to `end`, in one step. Raises LeadLost."""
        common = {
            "lane": batch.lane.value,
            "tenant": batch.tenant,
            "max_failures": "3",
            "metadata": "{}",
            "retention": self._retention,
            "batch": batch.id,
            "fence": str(batch.fence),
            "from": start,
            "to": end,
        }
        [answer, *_] = self._run("create", [json.dumps(common), *itertools.chain.from_iterable(jobs)])
        if answer != "made":
            raise LeadLost(batch.id)

    @said_clearly
    def in_flight(self, batch_id: str, queues: Iterable[str]) -> tuple[int, int, int]:
        """Numbers of its unfinished jobs, of its final jobs without stored results, and of all jobs in these queues."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.scard(self.keys.live(batch_id))
        pipeline.llen(self.keys.done(batch_id))
        for queue in queues:
            pipeline.zcard(self.keys.waiting(queue))
        live, done, *waiting = pipeline.execute()
        return live, done, sum(waiting)

    @said_clearly
    def finished(self, batch_id: str, limit: int) -> list[tuple[str, dict[str, str]]]:
        """The oldest final jobs without stored results: ids, and the fields that a result needs."""
        ids: list[str] = self._redis.lrange(self.keys.done(batch_id), 0, limit - 1)  # type: ignore[assignment]
        names = ("state", "custom_id", "images", "error", "finished_at")
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in ids:
            pipeline.hmget(self.keys.job(job_id), names)
        return [
            (job_id, {name: value for name, value in zip(names, values, strict=True) if value is not None})
            for job_id, values in zip(ids, pipeline.execute(), strict=True)
        ]

    @said_clearly
    def harvested(self, batch: BatchRecord, *, parts: Sequence[str], job_ids: Sequence[str]) -> None:
        """Results are in storage: the records of these jobs, the oldest final ones, go. Raises LeadLost."""
        if not self._run("batch_harvest", [batch.id, batch.fence, self._retention, len(parts), *parts, *job_ids]):
            raise LeadLost(batch.id)


def _full(whose: str, count: str, most: str) -> QueueFull:
    setting = "CALOTYPE_MAX_OPEN_BATCHES_PER_TENANT" if whose == "tenant" else "CALOTYPE_MAX_OPEN_BATCHES"
    those = "this tenant's batches" if whose == "tenant" else "batches"
    return QueueFull(
        f"{count} of {those} are open, and the limit is {most}; wait until one ends, use fewer batches, or raise "
        f"{setting}",
        _RETRY_SECONDS,
    )
