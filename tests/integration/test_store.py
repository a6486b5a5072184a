"""The job store on a real Valkey: each operation, its fences, and what the reaper brings back."""

from __future__ import annotations

import json
import time

import pytest
from redis import Redis

from calotype_shared.errors import JobNotFound, RedisUnavailable, UnreadableRecord
from calotype_shared.queue.job_store import MAX_CRASHES, QUARANTINE_CRASHES, Claim, JobStore, Reaped
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.enums import JobState, Lane, SamplerType
from calotype_shared.schema.jobs import ImageRef, JobError
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.schema.worker_info import WorkerInfo
from calotype_shared.settings import Settings
from tests.invariants import check_store

CONFIG = ResolvedConfig(prompt="a red circle", width=64, height=64, seed=1)
IMAGE = ImageRef(key="k", seed=1, width=64, height=64, content_type="image/png", bytes=3, sha256="0" * 64)
BROKEN = JobError(code="broken", message="it broke")


@pytest.fixture(autouse=True)
def _invariants(store: JobStore, redis: Redis) -> object:
    """After every test of this file, all keys must agree with the records."""
    yield
    check_store(store, redis)


def take(store: JobStore, *, worker: str = "w") -> Claim:
    """The next job of the bulk queue, which must have one."""
    claim = store.claim("demo.bulk", worker=worker, lease_seconds=20)
    assert claim is not None
    return claim


def expire_leases(store: JobStore, redis: Redis) -> None:
    """As if every lease had just run out, without waiting."""
    for job_id in redis.zrange(store.keys.leases, 0, -1):
        redis.zadd(store.keys.leases, {str(job_id): 1})


def lose(store: JobStore, redis: Redis) -> None:
    """Every worker is gone for good, and the reaper has seen it."""
    expire_leases(store, redis)
    redis.delete(store.keys.reaper)
    assert store.reap() is not None


def test_a_job_goes_from_queued_to_succeeded(store: JobStore) -> None:
    """The straight path, with everything the record should say at each stop."""
    (job_id,) = store.create([CONFIG], lane=Lane.INTERACTIVE, metadata={"for": "test"})
    record = store.get(job_id)
    assert (record.state, record.config, record.attempt) == (JobState.QUEUED, CONFIG, 0)
    assert record.digest == CONFIG.digest()
    assert record.metadata == {"for": "test"}
    assert store.depths() == {"demo.interactive": 1}

    claim = store.claim("demo.interactive", worker="w1", lease_seconds=20)
    assert claim is not None
    assert (claim.job_id, claim.attempt, claim.config) == (job_id, 1, CONFIG)
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


def test_a_job_that_ended_before_any_progress_has_its_steps(store: JobStore) -> None:
    (job_id,) = store.create([CONFIG])
    claim = store.claim("demo.bulk", worker="w1", lease_seconds=20)
    assert claim is not None
    assert store.commit(claim, images=[IMAGE], timings={}, steps=12)
    assert (store.get(job_id).step, store.get(job_id).total_steps) == (12, 12)


def test_a_message_is_pushed_with_the_record(store: JobStore, redis: Redis) -> None:
    """One message a job in its lane's list, each with a number of its own; jobs are claimed in their order."""
    ids = store.create([CONFIG] * 450)
    messages = [json.loads(m) for m in redis.lrange(store.keys.messages("demo.bulk"), 0, -1)]
    assert [json.loads(m["body"])[0] for m in messages] == [["demo.bulk"]] * 450
    assert len({m["properties"]["delivery_tag"] for m in messages}) == 450
    assert [take(store).job_id for _ in range(3)] == ids[:3]


def test_a_claim_is_exclusive(store: JobStore) -> None:
    """The second delivery of a message finds nothing to do."""
    store.create([CONFIG])
    assert store.claim("demo.bulk", worker="w1", lease_seconds=20)
    assert store.claim("demo.bulk", worker="w2", lease_seconds=20) is None
    assert store.claim("nothing.bulk", worker="w2", lease_seconds=20) is None


def test_a_zombie_cannot_write(store: JobStore, redis: Redis) -> None:
    """A worker whose lease was reaped may come back: nothing it does counts."""
    (job_id,) = store.create([CONFIG])
    zombie = take(store)
    expire_leases(store, redis)
    reaped = store.reap()
    assert reaped is not None
    assert reaped.requeued == (job_id,)
    heir = take(store)
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
    """It fails with the reason, instead of going round for ever, and stays to be looked at with its history."""
    (job_id,) = store.create([CONFIG], max_failures=2)
    for expected in (*[JobState.QUEUED] * (MAX_CRASHES - 1), JobState.FAILED):
        take(store)
        lose(store, redis)
        assert store.get(job_id).state is expected
    record = store.get(job_id)
    assert record.error is not None
    assert record.error.code == "worker_lost"
    assert (record.failures, record.crashes, record.attempt) == (0, MAX_CRASHES, MAX_CRASHES)
    assert [(a.attempt, a.how, a.worker) for a in record.history] == [
        (n, "lost", "w") for n in range(1, MAX_CRASHES + 1)
    ]
    assert all(record.created_at <= a.started_at <= a.ended_at for a in record.history)
    assert [r.id for r in store.dead()] == [job_id]
    assert store.dead(tenant="other") == []
    assert store.forget_dead(job_id)
    assert not store.forget_dead(job_id)
    assert store.dead() == []


def test_a_suspect_is_left_to_another_worker(store: JobStore, redis: Redis) -> None:
    """Jobs on which two workers have died are taken one at a time, so that the guilty one is found among them."""
    ids = store.create([CONFIG] * 3)
    for _ in range(QUARANTINE_CRASHES):
        suspects = [take(store).job_id for _ in range(2)]
        lose(store, redis)
    assert suspects == ids[:2]
    mine = take(store)
    assert mine.job_id == ids[0]
    other = store.claim("demo.bulk", worker="w1", lease_seconds=20, leave_quarantined=True)
    assert other is not None
    assert other.job_id == ids[2], "past the suspect in line before it"
    assert store.claim("demo.bulk", worker="w1", lease_seconds=20, leave_quarantined=True) is None
    assert take(store).job_id == ids[1]


def test_two_claims_of_one_number_are_told_apart(store: JobStore, redis: Redis) -> None:
    """Redis may lose its last second: the attempt is counted again, and still the first one's writes are refused."""
    (job_id,) = store.create([CONFIG])
    zombie = take(store)
    store.release(zombie)
    redis.hset(store.keys.job(job_id), "attempt", "0")
    heir = take(store)
    assert (heir.attempt, zombie.attempt) == (1, 1)
    assert heir.folder != zombie.folder
    assert store.renew([zombie], lease_seconds=20) == {job_id}
    assert not store.commit(zombie, images=[IMAGE], timings={})
    assert not store.release(zombie)
    assert store.fail(zombie, BROKEN, retry=True) is None
    assert store.commit(heir, images=[], timings={})


def test_calls_whose_answer_got_lost_may_be_repeated(store: JobStore) -> None:
    """The connection may break after a script has run: a second run of the same changes nothing."""
    new = [NewJob.of(CONFIG, lane=Lane.BULK) for _ in range(3)]
    assert store.create(new) == store.create(new) == [job.id for job in new]
    assert store.counts()[JobState.QUEUED] == 3
    claim = take(store)
    assert store.create(new)
    assert store.get(claim.job_id).state is JobState.RUNNING
    assert store.commit(claim, images=[IMAGE], timings={})
    assert store.commit(claim, images=[IMAGE], timings={}), "else its worker would delete the images"
    assert store.counts()[JobState.SUCCEEDED] == 1
    other = take(store)
    assert store.fail(other, BROKEN, retry=True) is JobState.QUEUED
    assert store.fail(other, BROKEN, retry=True) is None
    assert store.get(other.job_id).failures == 1


def test_attempts_without_a_commit_leave_orphans(store: JobStore, redis: Redis) -> None:
    """Whatever ended them; and their folders are known until they are swept."""
    ids = store.create([CONFIG] * 5)
    claims = [take(store) for _ in ids]
    lost, released, failed, cancelled, good = claims
    store.release(released)
    store.fail(failed, BROKEN, retry=False)
    store.cancel(cancelled.job_id)
    store.commit(good, images=[IMAGE], timings={})
    lose(store, redis)
    left = [lost.folder, released.folder, failed.folder, cancelled.folder]
    assert sorted(store.orphans(older_than_seconds=-1)) == sorted(left)
    assert store.orphans(older_than_seconds=60) == []
    store.swept(left[:3])
    assert store.orphans(older_than_seconds=-1) == left[3:]
    ends = {job_id: [a.how for a in store.get(job_id).history] for job_id in ids}
    assert list(ends.values()) == [["lost"], ["released"], ["failed"], ["cancelled"], []]
    [attempt] = store.get(failed.job_id).history
    assert attempt.error == BROKEN


def test_an_outage_costs_no_leases(store: JobStore, redis: Redis) -> None:
    """While Redis was away nobody could renew: the first reaper after it gives the holders time to."""
    (job_id,) = store.create([CONFIG])
    claim = take(store)
    assert store.reap() is not None
    expire_leases(store, redis)
    redis.set(store.keys.reaped_at, int(redis.get(store.keys.reaped_at) or 0) - 30_000_000)
    redis.delete(store.keys.reaper)
    assert store.reap() == Reaped()
    assert store.get(job_id).state is JobState.RUNNING
    assert store.renew([claim], lease_seconds=20) == set()
    lose(store, redis)
    assert store.get(job_id).state is JobState.QUEUED, "the next one takes what is still not renewed"


def test_a_record_that_cannot_be_read_is_nobodys_trouble(store: JobStore, redis: Redis) -> None:
    """A damaged one fails for good; one of a newer version waits for a newer worker; those behind them are done."""
    damaged, newer, good = store.create([CONFIG] * 3)
    redis.hset(store.keys.job(damaged), "config", "{")
    redis.hset(store.keys.job(newer), "schema", "2")
    assert take(store).job_id == good
    assert redis.hget(store.keys.job(damaged), "state") == "failed"
    assert redis.hget(store.keys.job(newer), "state") == "queued"
    assert store.claim("demo.bulk", worker="w1", lease_seconds=20) is None


def test_retries_are_counted_and_releases_are_not(store: JobStore) -> None:
    """A drain hands back without blame; an error uses up one of the failures."""
    (job_id,) = store.create([CONFIG], max_failures=2)
    for _ in range(5):
        claim = take(store)
        store.progress([(claim, 3, 10)])
        assert store.get(job_id).step == 3
        assert store.release(claim)
        assert store.get(job_id).progress == 0.0, "a queued job has done nothing yet"
    assert store.get(job_id).failures == 0
    outcomes = []
    for _ in range(2):
        claim = take(store)
        outcomes.append(store.fail(claim, BROKEN, retry=True))
    assert outcomes == [JobState.QUEUED, JobState.FAILED]
    record = store.get(job_id)
    assert (record.error, record.attempt, record.failures) == (BROKEN, 7, 2)


def test_an_error_of_the_job_itself_is_final_at_once(store: JobStore) -> None:
    """Without `retry` there is no second attempt."""
    store.create([CONFIG])
    claim = take(store)
    assert store.fail(claim, BROKEN, retry=False) is JobState.FAILED


def test_a_claim_that_committed_is_not_lost(store: JobStore, redis: Redis) -> None:
    """The response to a commit may be lost. A worker that then heard of a lost claim would delete the images."""
    (job_id,) = store.create([CONFIG])
    zombie = take(store)
    expire_leases(store, redis)
    store.reap()
    claim = take(store)
    assert store.commit(claim, images=[IMAGE], timings={})
    assert store.renew([claim], lease_seconds=20) == set()
    assert store.renew([zombie], lease_seconds=20) == {job_id}
    assert redis.zscore(store.keys.leases, job_id) is None, "a final job has no lease"


def test_cancel_wins_over_a_later_commit_and_loses_to_an_earlier_one(store: JobStore) -> None:
    """Whichever script runs first decides; the other changes nothing."""
    first, second, third = store.create([CONFIG] * 3)
    claims = [take(store), take(store)]
    assert [claim.job_id for claim in claims] == [first, second]
    with store.news() as wait:
        assert store.cancel(first) is JobState.CANCELLED
        assert wait(5) == ("cancelled", first)
    assert not store.commit(claims[0], images=[IMAGE], timings={})
    assert store.renew([claims[0]], lease_seconds=20) == {first}
    assert store.commit(claims[1], images=[IMAGE], timings={})
    assert store.cancel(second) is JobState.SUCCEEDED
    assert store.cancel(third) is JobState.CANCELLED
    assert store.claim("demo.bulk", worker="w", lease_seconds=20) is None
    assert store.get(first).images == ()


def test_workers_are_notified_of_interactive_jobs_however_they_are_queued(store: JobStore) -> None:
    """Submitted, or handed back by another worker; of bulk jobs, and of queues they do not serve, they hear nothing."""
    with store.news("demo.interactive") as wait:
        store.create([CONFIG])
        store.create([CONFIG.model_copy(update={"model": "other"})], lane=Lane.INTERACTIVE)
        assert wait(0.2) is None
        store.create([CONFIG], lane=Lane.INTERACTIVE)
        assert wait(5) == ("arrived", "demo.interactive")
        claim = store.claim("demo.interactive", worker="w", lease_seconds=20)
        assert claim is not None
        assert store.release(claim)
        assert wait(5) == ("arrived", "demo.interactive")
        assert wait(0.2) is None


def test_an_unknown_job_is_told_from_a_queued_one(store: JobStore) -> None:
    """Waiting and missing must never look alike."""
    (job_id,) = store.create([CONFIG])
    assert store.get(job_id).state is JobState.QUEUED
    with pytest.raises(JobNotFound, match="'nothing'"):
        store.get("nothing")
    with pytest.raises(JobNotFound, match="'nothing'"):
        store.cancel("nothing")
    assert [r.id if r else None for r in store.get_many([job_id, "nothing"])] == [job_id, None]


def test_messages_lost_on_their_way_are_sent_again(redis: Redis, settings: Settings) -> None:
    """The worker died between taking a message and claiming by it: nobody may wait for ever."""
    store = JobStore(redis, key_prefix=settings.key_prefix, gap_seconds=0.05)
    store.create([CONFIG] * 3)
    queue = store.keys.messages("demo.bulk")
    redis.rpop(queue, 2)
    first = store.reap()  # what lacks at one look may be in a worker's hands
    assert first is not None
    assert first.republished == 0
    assert wait_for_invitations(store, redis) == 2
    assert redis.llen(queue) == 3
    take(store)
    redis.rpop(queue, 3)
    assert wait_for_invitations(store, redis) == 2, "beside an empty list too"


def test_messages_in_hand_are_not_taken_for_lost(redis: Redis, settings: Settings) -> None:
    """Workers claim a moment after they took a message, and jobs come back out of turn."""
    store = JobStore(redis, key_prefix=settings.key_prefix, gap_seconds=0.02)
    store.create([CONFIG] * 3)
    for _ in range(4):
        redis.rpop(store.keys.messages("demo.bulk"))
        redis.delete(store.keys.reaper)
        reaped = store.reap()
        assert reaped is not None
        assert reaped.republished == 0
        claim = take(store)
        time.sleep(0.03)  # longer than the gap: the very thing under test is the passing of time
        redis.delete(store.keys.reaper)
        assert store.reap() is not None
        store.release(claim)


def test_a_cancelled_job_takes_its_message_along(store: JobStore, redis: Redis) -> None:
    """Thousands of cancelled jobs leave no messages that workers would have to wade through."""
    ids = store.create([CONFIG] * 5)
    for job_id in ids[1:4]:
        store.cancel(job_id)
    assert redis.llen(store.keys.messages("demo.bulk")) == 2
    assert [take(store).job_id, take(store).job_id] == [ids[0], ids[4]]


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
            and redis.zcard(store.keys.recent("default")) == 1
        )
    )
    assert [record.id for record in store.jobs()] == [queued]
    with pytest.raises(JobNotFound, match=f"'{done}'"):
        store.get(done)


def test_jobs_are_listed_newest_first_and_by_state(store: JobStore) -> None:
    """What `calotype jobs` shows."""
    ids = store.create([CONFIG] * 5)
    store.cancel(ids[2])
    assert [record.id for record in store.jobs(limit=3)] == ids[:1:-1]
    assert [record.id for record in store.jobs(state=JobState.CANCELLED)] == [ids[2]]


def test_an_unreadable_record_spoils_no_listing(store: JobStore, redis: Redis) -> None:
    """A damaged record is a clear error alone, and skipped among others."""
    damaged, good = store.create([CONFIG] * 2)
    redis.hset(store.keys.job(damaged), "config", "{")
    with pytest.raises(UnreadableRecord, match="is damaged"):
        store.get(damaged)
    assert [r and r.id for r in store.get_many([damaged, good])] == [None, good]
    assert [record.id for record in store.jobs()] == [good]


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
    store.announce_worker(info, ttl_seconds=0.05, cards=[card, card.model_copy(update={"name": "other"})])
    assert set(store.models()) == {"demo", "other"}
    assert store.served_together() == [frozenset({"demo", "other"})]
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
    from calotype_shared.queue.connection import connect_redis

    return connect_redis(settings)


def until(condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def wait_for_invitations(store: JobStore, redis: Redis) -> int:
    found: list[int] = []

    def reap() -> bool:
        redis.delete(store.keys.reaper)
        reaped = store.reap()
        if reaped and reaped.republished:
            found.append(reaped.republished)
        return bool(found)

    until(reap)
    return found[0]
