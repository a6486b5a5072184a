"""Jobs that failed for good: kept with their history, tried again, let go; on a real Valkey."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import pytest
from redis import Redis

from calotype import Client, JobNotFound, Lane, Settings
from calotype_shared.queue.job_store import MAX_CRASHES, JobStore
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import JobError
from tests.integration.conftest import Command
from tests.integration.test_fair_share import CARD
from tests.invariants import check_store


@pytest.fixture
def client(settings: Settings, store: JobStore, redis: Redis) -> Iterator[Client]:
    store.announce_model(CARD)
    with Client(settings=settings) as client:
        yield client
    check_store(store, redis)


@pytest.fixture
def command(calotype: Command) -> Command:
    return functools.partial(calotype, "dead", typed="n")


def fail(client: Client, store: JobStore, prompt: str = "x", **options: object) -> str:
    """A job that its worker finds impossible."""
    job = client.submit(prompt, lane=Lane.BULK, num_inference_steps=5, **options)  # type: ignore[arg-type]
    claim = store.claim("demo.bulk", worker="w", lease_seconds=30)
    assert claim is not None
    assert store.fail(claim, JobError(code="bad", message="it [/cannot] be\x1b[2J done"), retry=False)
    return job.id


def crash(store: JobStore, redis: Redis, worker: str) -> None:
    """A worker claims the next job and is never heard of again."""
    claim = store.claim("demo.bulk", worker=worker, lease_seconds=30)
    assert claim is not None
    redis.zadd(store.keys.leases, {claim.job_id: 1})
    redis.delete(store.keys.reaper)
    assert store.reap() is not None


def test_a_poison_job_keeps_its_history(client: Client, store: JobStore, redis: Redis) -> None:
    job = client.submit("poison", lane=Lane.BULK, num_inference_steps=5)
    for number in range(MAX_CRASHES):
        assert client.dead_jobs.list() == []
        crash(store, redis, f"worker-{number}")
    [record] = client.dead_jobs.list()
    assert (record.id, record.state, record.crashes) == (job.id, JobState.FAILED, MAX_CRASHES)
    assert [(a.attempt, a.worker, a.how) for a in record.history] == [
        (number + 1, f"worker-{number}", "lost") for number in range(MAX_CRASHES)
    ]
    assert all(attempt.started_at <= attempt.ended_at for attempt in record.history)


def test_a_retry_is_a_new_job_made_once(client: Client, store: JobStore, redis: Redis) -> None:
    old = fail(client, store, tenant="acme", seed=5, metadata={"order": 7})
    score = redis.zscore(store.keys.dead, old)
    assert score is not None
    new = client.dead_jobs.retry(old)
    redis.zadd(store.keys.dead, {old: score})  # as if the answer had got lost in between
    assert client.dead_jobs.retry(old).id == new.id != old
    assert client.dead_jobs.list() == []
    first, second = client.status(old), new.status()
    assert (second.config, second.tenant, second.lane, second.metadata) == (
        first.config,
        "acme",
        Lane.BULK,
        {"order": 7},
    )
    assert (second.state, second.failures, first.state) == (JobState.QUEUED, 0, JobState.FAILED)
    for call in (client.dead_jobs.retry, client.dead_jobs.drop):
        with pytest.raises(JobNotFound, match="calotype dead list"):
            call(old)
    with pytest.raises(JobNotFound, match=rf"'{new.id}'.*calotype dead list"):
        client.dead_jobs.retry(new.id)


def test_lists_forget_what_has_expired(client: Client, store: JobStore, redis: Redis) -> None:
    gone, there = fail(client, store, "a"), fail(client, store, "b", tenant="acme")
    assert [record.id for record in client.dead_jobs.list()] == [there, gone]
    assert [record.id for record in client.dead_jobs.list(tenant="acme")] == [there]
    redis.delete(store.keys.job(gone))
    assert [record.id for record in client.dead_jobs.list()] == [there]
    assert redis.zcard(store.keys.dead) == 1


def test_a_batchs_dead_job_is_looked_at_too(client: Client, store: JobStore, redis: Redis) -> None:
    from calotype import Dispatcher
    from tests.integration.conftest import until

    batch = client.batches.submit([{"prompt": "poison", "num_inference_steps": 5}])
    with Dispatcher(client.settings):
        for number in range(MAX_CRASHES):
            until(lambda: store.depths().get("demo.bulk") == 1)
            crash(store, redis, f"worker-{number}")
        batch.wait(120)
    [record] = client.dead_jobs.list()
    assert (record.batch, len(record.history)) == (batch.id, MAX_CRASHES)
    again = client.dead_jobs.retry(record.id)
    assert (again.status().state, again.status().batch) == (JobState.QUEUED, None)
    again.cancel()


def test_the_commands(client: Client, store: JobStore, command: Command) -> None:
    first, second, third = (fail(client, store, prompt) for prompt in "abc")
    listed = command("list")
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == [third, second, first]
    assert [job["id"] for job in json.loads(command("list", "--limit", "1", "--json").stdout)] == [third]
    shown = command("show", first).stdout
    assert "bad: it [/cannot] be" in shown
    assert "\x1b" not in shown
    assert '"prompt":"a"' in shown
    assert json.loads(command("show", first, "--json").stdout)["history"][0]["how"] == "failed"

    retried = command("retry", first)
    assert client.status(retried.stdout.strip()).state is JobState.QUEUED
    assert command("drop", second).returncode == 0
    assert command("drop", second, third).returncode == 3, "nothing is done if one is not there"
    assert [record.id for record in client.dead_jobs.list()] == [third]
    assert command("drop").returncode == 2
    assert command("drop", third, "--all").returncode == 2
    assert command("drop", "--all").returncode == 130, "it asks first"
    assert command("drop", "--all", "--tenant", "other", "--yes").returncode == 0
    assert [record.id for record in client.dead_jobs.list()] == [third]
    assert command("drop", "--all", "--yes").returncode == 0
    assert client.dead_jobs.list() == []
