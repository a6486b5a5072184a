"""The job store on a real Valkey: each operation, its fences, and what the reaper brings back."""

from __future__ import annotations

import json
import time

import pytest
from redis import Redis

from calotype_shared.config import GenerationConfig, SamplerType
from calotype_shared.errors import InvalidRequest, JobNotFound, RedisUnavailable
from calotype_shared.jobs import ImageRef, JobError, JobState, Lane
from calotype_shared.model_card import ModelCard
from calotype_shared.records import UnreadableRecord
from calotype_shared.settings import Settings
from calotype_shared.store import JobStore
from calotype_shared.worker_info import WorkerInfo
from tests.invariants import check_store

CONFIG = GenerationConfig(prompt="a red circle", width=64, height=64, seed=1)
IMAGE = ImageRef(key="k", seed=1, width=64, height=64, content_type="image/png", bytes=3, sha256="0" * 64)
BROKEN = JobError(code="broken", message="it broke")


@pytest.fixture(autouse=True)
def _invariants(store: JobStore, redis: Redis) -> object:
    """After every test of this file, all keys must agree with the records."""
    yield
    check_store(store, redis)


def expire_leases(store: JobStore, redis: Redis) -> None:
    """As if every lease had just run out, without waiting."""
    for job_id in redis.zrange(store.keys.leases, 0, -1):
        redis.zadd(store.keys.leases, {job_id: 1})


def test_a_job_goes_from_queued_to_succeeded(store: JobStore) -> None:
    """The straight path, with everything the record should say at each stop."""
    (job_id,) = store.create([CONFIG], lane=Lane.INTERACTIVE, metadata={"for": "test"})
    record = store.get(job_id)
    assert (record.state, record.config, record.attempt) == (JobState.QUEUED, CONFIG, 0)
    assert record.digest == CONFIG.digest()
    assert record.metadata == {"for": "test"}
    assert store.depths() == {"demo.interactive": 1}

    claim = store.claim(job_id, worker="w1", lease_seconds=20)
    assert claim is not None
    assert (claim.attempt, claim.config) == (1, CONFIG)
    assert store.renew([claim], lease_seconds=20) == set()
    store.progress([(claim, 3, 12)])
    record = store.get(job_id)
    assert (record.state, record.worker, record.progress) == (JobState.RUNNING, "w1", 0.25)

    assert store.commit(claim, images=[IMAGE], timings={"denoise": 1.5})
    record = store.get(job_id)
    assert (record.state, record.images, record.progress) == (JobState.SUCCEEDED, (IMAGE,), 1.0)
    assert record.timings == {"denoise": 1.5}
    assert record.created_at <= record.started_at <= record.finished_at  # type: ignore[operator]
    assert store.counts()[JobState.SUCCEEDED] == 1


def test_the_message_is_pushed_with_the_record(store: JobStore, redis: Redis) -> None:
    """One message a job in its lane's list, saying the job's id, in the order of submission."""
    ids = store.create([CONFIG] * 450)
    messages = [json.loads(m) for m in redis.lrange(store.keys.messages("demo.bulk"), 0, -1)]
    assert [json.loads(m["body"])[0] for m in reversed(messages)] == [[job_id] for job_id in ids]


def test_a_claim_is_exclusive(store: JobStore) -> None:
    """The second delivery of a message finds nothing to do."""
    (job_id,) = store.create([CONFIG])
    assert store.claim(job_id, worker="w1", lease_seconds=20)
    assert store.claim(job_id, worker="w2", lease_seconds=20) is None
    assert store.claim("nothing", worker="w2", lease_seconds=20) is None


def test_a_zombie_cannot_write(store: JobStore, redis: Redis) -> None:
    """A worker whose lease was reaped may come back: nothing it does counts."""
    (job_id,) = store.create([CONFIG])
    zombie = store.claim(job_id, worker="zombie", lease_seconds=20)
    assert zombie is not None
    expire_leases(store, redis)
    reaped = store.reap()
    assert reaped is not None
    assert reaped.requeued == (job_id,)
    heir = store.claim(job_id, worker="heir", lease_seconds=20)
    assert heir is not None
    assert heir.attempt == 2
    assert store.renew([zombie, heir], lease_seconds=20) == {job_id}
    store.progress([(zombie, 9, 9)])
    assert store.get(job_id).step == 0
    assert not store.commit(zombie, images=[IMAGE], timings={})
    assert store.fail(zombie, BROKEN, retry=True) is None
    assert not store.release(zombie)
    assert store.get(job_id).state is JobState.RUNNING
    assert store.commit(heir, images=[], timings={})


def test_a_job_that_kills_its_workers_is_given_up(store: JobStore, redis: Redis) -> None:
    """After its allowed failures a job fails with the reason, instead of going round for ever."""
    (job_id,) = store.create([CONFIG], max_failures=2)
    for expected in (JobState.QUEUED, JobState.FAILED):
        assert store.claim(job_id, worker="w", lease_seconds=20)
        expire_leases(store, redis)
        redis.delete(store.keys.reaper)
        assert store.reap() is not None
        assert store.get(job_id).state is expected
    error = store.get(job_id).error
    assert error is not None
    assert error.code == "worker_lost"


def test_retries_are_counted_and_releases_are_not(store: JobStore) -> None:
    """A drain hands back without blame; an error uses up one of the failures."""
    (job_id,) = store.create([CONFIG], max_failures=2)
    for _ in range(5):
        claim = store.claim(job_id, worker="w", lease_seconds=20)
        assert claim is not None
        store.progress([(claim, 3, 10)])
        assert store.get(job_id).step == 3
        assert store.release(claim)
        assert store.get(job_id).progress == 0.0, "a queued job has done nothing yet"
    assert store.get(job_id).failures == 0
    outcomes = []
    for _ in range(2):
        claim = store.claim(job_id, worker="w", lease_seconds=20)
        assert claim is not None
        outcomes.append(store.fail(claim, BROKEN, retry=True))
    assert outcomes == [JobState.QUEUED, JobState.FAILED]
    record = store.get(job_id)
    assert (record.error, record.attempt, record.failures) == (BROKEN, 7, 2)


def test_an_error_of_the_job_itself_is_final_at_once(store: JobStore) -> None:
    """Without `retry` there is no second attempt."""
    (job_id,) = store.create([CONFIG])
    claim = store.claim(job_id, worker="w", lease_seconds=20)
    assert claim is not None
    assert store.fail(claim, BROKEN, retry=False) is JobState.FAILED


def test_cancel_wins_over_a_later_commit_and_loses_to_an_earlier_one(store: JobStore) -> None:
    """Whichever script runs first decides; the other changes nothing."""
    first, second, third = store.create([CONFIG] * 3)
    claims = [store.claim(job_id, worker="w", lease_seconds=20) for job_id in (first, second)]
    assert claims[0] is not None
    assert claims[1] is not None
    with store.cancellations() as wait:
        assert store.cancel(first) is JobState.CANCELLED
        assert wait(5) == first
    assert not store.commit(claims[0], images=[IMAGE], timings={})
    assert store.renew([claims[0]], lease_seconds=20) == {first}
    assert store.commit(claims[1], images=[IMAGE], timings={})
    assert store.cancel(second) is JobState.SUCCEEDED
    assert store.cancel(third) is JobState.CANCELLED
    assert store.claim(third, worker="w", lease_seconds=20) is None
    assert store.get(first).images == ()


def test_an_unknown_job_is_told_from_a_queued_one(store: JobStore) -> None:
    """ "Waiting" and "missing" must never look alike."""
    (job_id,) = store.create([CONFIG])
    assert store.get(job_id).state is JobState.QUEUED
    with pytest.raises(JobNotFound, match="'nothing'"):
        store.get("nothing")
    with pytest.raises(JobNotFound):
        store.cancel("nothing")
    assert [r.id if r else None for r in store.get_many([job_id, "nothing"])] == [job_id, None]


def test_a_message_lost_on_its_way_is_published_again(store: JobStore, redis: Redis, settings: Settings) -> None:
    """The worker died between taking the message and claiming: a later job was claimed, this one never will be."""
    store = JobStore(redis_text(settings), key_prefix=settings.key_prefix, gap_seconds=0.05)
    lost, later, waiting = store.create([CONFIG] * 3)
    queue = store.keys.messages("demo.bulk")
    redis.rpop(queue)  # the oldest message vanishes
    assert store.claim(later, worker="w", lease_seconds=20)
    redis.rpop(queue)
    first = store.reap()  # sees the mark
    assert first is not None
    assert first.republished == ()
    republished = wait_for_republish(store, redis)
    assert republished == (lost,), "only the job that was overtaken; the one still in line keeps its one message"
    assert json.loads(json.loads(redis.lindex(queue, -1))["body"])[0] == [lost]  # at the front of the line
    assert redis.llen(queue) == 2
    assert store.get(waiting).state is JobState.QUEUED


def test_a_message_lost_beside_an_empty_queue_is_published_again(
    store: JobStore, redis: Redis, settings: Settings
) -> None:
    """No later job ever comes, and still nobody may wait for ever."""
    store = JobStore(redis_text(settings), key_prefix=settings.key_prefix, gap_seconds=0.05)
    (job_id,) = store.create([CONFIG])
    redis.rpop(store.keys.messages("demo.bulk"))
    assert wait_for_republish(store, redis) == (job_id,)
    assert store.claim(job_id, worker="w", lease_seconds=20)


def test_a_requeued_job_does_not_make_others_look_lost(store: JobStore, redis: Redis, settings: Settings) -> None:
    """It is claimed out of turn, so its claim says nothing about those in line."""
    store = JobStore(redis_text(settings), key_prefix=settings.key_prefix, gap_seconds=0.05)
    ids = store.create([CONFIG] * 3)
    claim = store.claim(ids[0], worker="w", lease_seconds=20)
    assert claim is not None
    assert store.release(claim)
    assert store.claim(ids[0], worker="w", lease_seconds=20)
    for _ in range(3):
        redis.delete(store.keys.reaper)
        reaped = store.reap()
        assert reaped is not None
        assert reaped.republished == ()
        time.sleep(0.06)  # longer than the gap: the very thing under test is the passing of time


def test_only_one_worker_reaps_at_a_time(store: JobStore) -> None:
    """The second gets None at once instead of waiting."""
    assert store.reap() is not None
    assert store.reap() is None


def test_finished_records_expire_and_leave_the_recent_list(store: JobStore, redis: Redis, settings: Settings) -> None:
    """Redis memory does not grow with what was done long ago."""
    store = JobStore(redis_text(settings), key_prefix=settings.key_prefix, retention_seconds=0.05)
    done, queued = store.create([CONFIG] * 2)
    assert store.cancel(done) is JobState.CANCELLED
    until(lambda: not redis.exists(store.keys.job(done)))
    until(
        lambda: (
            redis.delete(store.keys.reaper) is not None
            and store.reap() is not None
            and redis.zcard(store.keys.recent) == 1
        )
    )
    assert [record.id for record in store.jobs()] == [queued]
    with pytest.raises(JobNotFound):
        store.get(done)


def test_jobs_are_listed_newest_first_and_by_state(store: JobStore) -> None:
    """What `calotype jobs` shows."""
    ids = store.create([CONFIG] * 5)
    store.cancel(ids[2])
    assert [record.id for record in store.jobs(limit=3)] == ids[:1:-1]
    assert [record.id for record in store.jobs(state=JobState.CANCELLED)] == [ids[2]]


def test_an_unreadable_record_spoils_no_listing(store: JobStore, redis: Redis) -> None:
    """A record of a newer version is a clear error alone, and skipped among others."""
    newer, good = store.create([CONFIG] * 2)
    redis.hset(store.keys.job(newer), "schema", "99")
    with pytest.raises(UnreadableRecord, match="schema '99'"):
        store.get(newer)
    assert [r and r.id for r in store.get_many([newer, good])] == [None, good]
    redis.hset(store.keys.job(newer), "schema", "1")


def test_an_open_config_is_refused_before_anything_is_written(store: JobStore) -> None:
    """A stored config must reproduce its picture, so its seed cannot be missing."""
    with pytest.raises(InvalidRequest, match="still open"):
        store.create([CONFIG.model_copy(update={"seed": None})])
    assert store.counts()[JobState.QUEUED] == 0


def test_models_and_workers_announce_themselves(store: JobStore) -> None:
    """Cards stay, worker reports go when they are not renewed."""
    card = ModelCard(
        name="demo",
        family="sd",
        version="1",
        size_multiple=8,
        native_sizes=((64, 64),),
        max_pixels=9,
        max_prompt_tokens=9,
        samplers=tuple(SamplerType),
    )
    store.announce_model(card)
    assert store.models() == {"demo": card}
    info = WorkerInfo(name="w1", model="demo", device="cpu", host="h", pid=1, version="0", started_at=0.0)
    store.announce_worker(info, ttl_seconds=0.05)
    assert store.workers() == [info]
    until(lambda: store.workers() == [])
    store.announce_worker(info, ttl_seconds=60)
    store.retire_worker("w1")
    assert store.workers() == []


def test_redis_away_is_said_with_its_address_and_never_its_password() -> None:
    """The message names host and port and the setting to check."""
    settings = Settings.load(redis_url="redis://user:hunter2@127.0.0.1:1/0")
    store = JobStore(redis_text(settings))
    with pytest.raises(RedisUnavailable, match=r"127\.0\.0\.1:1.*CALOTYPE_REDIS_URL") as caught:
        store.ping()
    assert "hunter2" not in str(caught.value)


def redis_text(settings: Settings) -> Redis:
    from calotype_shared.settings import connect_redis

    return connect_redis(settings)


def until(condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def wait_for_republish(store: JobStore, redis: Redis) -> tuple[str, ...]:
    found: list[tuple[str, ...]] = []

    def reap() -> bool:
        redis.delete(store.keys.reaper)
        reaped = store.reap()
        if reaped and reaped.republished:
            found.append(reaped.republished)
        return bool(found)

    until(reap)
    return found[0]
