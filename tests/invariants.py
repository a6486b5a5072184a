"""What must hold of all Redis keys at any moment: every index agrees with the records, and nothing is left over."""

from __future__ import annotations

import json
import re
from collections import Counter

from redis import Redis

from calotype_shared.queue.job_store import JobStore
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.enums import JobState
from calotype_shared.storage.s3 import Storage


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
        queued = {
            j
            for j, r in records.items()
            if r["state"] == JobState.QUEUED and r["queue"] == queue and "leader" not in r  # else it waits for an equal
        }
        assert ids == queued, f"{queue}: waiting {ids} are not the queued jobs {queued}"

    counts = store.counts()
    for state in (JobState.QUEUED, JobState.RUNNING):
        assert counts[state] == by_state[state], f"{state}: counted {counts[state]}, found {by_state[state]}"
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        assert counts[state] >= by_state[state], f"{state}: counted {counts[state]}, found {by_state[state]}"

    pending = Counter(r["tenant"] for r in records.values() if r["state"] == JobState.QUEUED and "batch" not in r)
    counted = {_text(k): int(v) for k, v in redis.hgetall(keys.pending).items()}
    expected = {**pending, "*": pending.total()}
    assert {k: v for k, v in counted.items() if v} == {k: v for k, v in expected.items() if v}, "pending"

    for job_id, record in records.items():
        final = JobState(record["state"]).final
        kept = not final or ("batch" in record and "harvested" not in record)  # until its result is written down
        assert (redis.pttl(keys.job(job_id)) < 0) == kept, f"{job_id}: only final records may expire"
        assert ("finished_at" in record) == final, f"{job_id}: finished_at belongs to final records"

    check_equal_jobs(records, redis, store)
    ours = {value for name in dir(keys) if isinstance(value := getattr(keys, name), str) and not name.startswith("_")}
    for queue in queues:
        ours |= {keys.waiting(queue), keys.queue_state(queue), keys.messages(queue), keys.tenant_tags(queue)}
    ours.add(f"{keys.prefix}messages")  # only scripts use it
    celerys = {f"{keys.prefix}{name}" for name in ("unacked", "unacked_index", "unacked_mutex")}
    families = [
        *("job", "worker", "preview", "recent", "batch", "batches", "leader", "live", "done", "parts", "finished"),
        *("in_flight", "followers", "idempotency", "hook", "rate_limit", "files", "options"),
    ]
    known = (*(f"{keys.prefix}{family}:" for family in families), f"{keys.prefix}_kombu.binding")
    unknown = {name for name in names - ours - celerys if not name.startswith(known)}
    assert not unknown, f"keys that nothing documents: {unknown}"


def check_equal_jobs(records: dict[str, dict[str, str]], redis: Redis, store: JobStore) -> None:
    """Who waits for an equal job waits for a live one, which knows it; and nothing waits for a final one."""
    for job_id, record in records.items():
        followers = {_text(f) for f in redis.lrange(store.keys.followers(job_id), 0, -1)}
        waiting = {j for j, r in records.items() if r.get("leader") == job_id and r["state"] == JobState.QUEUED}
        assert followers == waiting, f"{job_id}: followed by {followers}, but {waiting} wait for it"
        if JobState(record["state"]).final:
            assert not followers
            assert _text(redis.get(store.keys.in_flight(record.get("identity", "")))) != job_id


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def check_bucket(store: JobStore, redis: Redis, storage: Storage) -> None:
    """Every object that is ours is referred to, and every reference has its object. Raises AssertionError.

    Written apart from what collects: it holds everything in memory, and reads results as their readers do.
    """
    keys = store.keys
    there = {key for key in storage.list() if not key.startswith("foreign/")}
    wanted, may_be = {"calotype-gc.json"} & there, set()
    for name in map(_text, redis.scan_iter(match=f"{keys.prefix}*", count=1000)):
        if name.startswith(keys.job("")):
            record = {_text(k): _text(v) for k, v in redis.hgetall(name).items()}
            wanted |= _images(json.loads(record.get("images", "[]")))
            wanted |= {
                f"uploads/{upload}.png" for upload in GenerationConfig.parse(json.loads(record["config"])).uploads
            }
            if record["state"] == JobState.RUNNING:
                folder = f"{name.removeprefix(keys.job(''))}/{record['attempt']}-{record['token']}/"
                may_be |= {key for key in there if key.startswith(folder)}
        elif name.startswith(keys.finished("")):
            wanted |= _images(json.loads(_text(redis.get(name))))
        elif name.startswith(keys.files("")):
            tenant = name.removeprefix(keys.files(""))
            wanted |= {f"files/{tenant}/{_text(file)}" for file in redis.hkeys(name)}
        elif name.startswith(keys.batch("")):
            batch = {_text(k): _text(v) for k, v in redis.hgetall(name).items()}
            parts = list(map(_text, redis.lrange(keys.parts(name.removeprefix(keys.batch(""))), 0, -1)))
            named = [batch[file] for file in ("manifest", "output", "errors") if batch.get(file)] + parts
            wanted |= set(named)
            if batch.get("plan"):
                may_be |= {key for key in there if key.startswith(batch["plan"])}
            for file in named[1:]:
                for line in storage.get(file).splitlines():
                    wanted |= _images(json.loads(line).get("images", []))
            for line in storage.get(batch["manifest"]).splitlines() if "completed_at" not in batch else ():
                wanted |= {f"uploads/{found}.png" for found in re.findall(r"[0-9a-f]{64}", line.decode())}
    assert wanted <= there, f"referred to, and not there: {sorted(wanted - there)}"
    assert there <= wanted | may_be, f"nobody refers to: {sorted(there - wanted - may_be)}"


def _images(images: list[dict[str, str]]) -> set[str]:
    """Each with its provenance beside it."""
    return {name for image in images for name in (image["key"], re.sub(r"\.\w+$", ".json", image["key"]))}
