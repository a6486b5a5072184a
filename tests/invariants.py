"""What must hold of all Redis keys at any moment: every index agrees with the records, and nothing is left over."""

from __future__ import annotations

from collections import Counter

from redis import Redis

from calotype_shared.jobs import JobState
from calotype_shared.store import JobStore


def check_store(store: JobStore, redis: Redis) -> None:
    """Walk every key under the store's prefix and compare. Raises AssertionError with what disagrees."""
    keys = store.keys
    names = {_text(key) for key in redis.scan_iter(match=f"{keys.prefix}*", count=1000)}
    records = {
        name.removeprefix(keys.job("")): {_text(k): _text(v) for k, v in redis.hgetall(name).items()}
        for name in names
        if name.startswith(keys.job(""))
    }
    by_state = Counter(record["state"] for record in records.values())
    leases = {_text(job_id) for job_id in redis.zrange(keys.leases, 0, -1)}
    running = {job_id for job_id, record in records.items() if record["state"] == JobState.RUNNING}
    assert leases == running, f"leases {leases} are not the running jobs {running}"

    queues = {_text(queue) for queue in redis.smembers(keys.queues)}
    waiting = {queue: {_text(j) for j in redis.zrange(keys.waiting(queue), 0, -1)} for queue in queues}
    for queue, ids in waiting.items():
        queued = {j for j, r in records.items() if r["state"] == JobState.QUEUED and r["queue"] == queue}
        assert ids == queued, f"{queue}: waiting {ids} are not the queued jobs {queued}"

    counts = store.counts()
    for state in (JobState.QUEUED, JobState.RUNNING):
        assert counts[state] == by_state[state], f"{state}: counted {counts[state]}, found {by_state[state]}"
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        assert counts[state] >= by_state[state], f"{state}: counted {counts[state]}, found {by_state[state]}"

    for job_id, record in records.items():
        final = JobState(record["state"]).final
        assert (redis.pttl(keys.job(job_id)) >= 0) == final, f"{job_id}: only final records may expire"
        assert ("finished_at" in record) == final, f"{job_id}: finished_at belongs to final records"

    ours = {keys.leases, keys.counts, keys.recent, keys.models, keys.workers, keys.reaper, keys.queues, keys.together}
    for queue in queues:
        ours |= {keys.waiting(queue), keys.mark(queue), keys.messages(queue)}
    celerys = {f"{keys.prefix}{name}" for name in ("unacked", "unacked_index", "unacked_mutex")}
    unknown = {
        name
        for name in names - ours - celerys
        if not name.startswith((keys.job(""), keys.worker(""), keys.preview(""), f"{keys.prefix}_kombu.binding"))
    }
    assert not unknown, f"keys that nothing documents: {unknown}"


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
