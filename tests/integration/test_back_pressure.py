"""Too much at once: what waits is bounded, and who is refused learns when to come again. Real Valkey and gateway."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from calotype import Client
from calotype.batches.dispatcher import Dispatcher
from calotype.embedded import EmbeddedServers
from calotype.embedded.valkey import ValkeyServer
from calotype_shared.errors import QueueFull, RedisUnavailable
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.submission import queue_full
from calotype_shared.schema.enums import Feature, JobState
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.settings import Settings
from tests.integration.conftest import until
from tests.integration.gateway import Gateway, own_settings
from tests.integration.test_client import CARD
from tests.invariants import check_store
from tests.simulated import SimulatedWorker, image_of

FIELDS: dict[str, Any] = {"model": "demo", "width": 64, "height": 64, "num_inference_steps": 2}


def configs(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{**FIELDS, "prompt": f"cat {first + i}", "seed": first + i} for i in range(count)]


def limited(settings: Settings, **limits: int) -> Client:
    return Client(settings=settings.model_copy(update=limits))


def drain(settings: Settings, store: JobStore, *, queue: str = "demo.bulk") -> None:
    with SimulatedWorker(settings, queue):
        until(lambda: store.counts()[JobState.QUEUED] + store.counts()[JobState.RUNNING] == 0)


@pytest.fixture(autouse=True)
def _announced_and_checked(store: JobStore, redis: Redis) -> Iterator[None]:
    store.announce_model(CARD)
    yield
    check_store(store, redis)


def test_beyond_the_limit_nothing_is_queued_and_after_some_work_there_is_room(
    settings: Settings, store: JobStore
) -> None:
    client = limited(settings, max_queued=10)
    client.submit_many(configs(8))
    for call in (lambda: client.submit_many(configs(3, 8)), lambda: client.submit_many(configs(11, 8))):
        with pytest.raises(QueueFull, match="10") as refused:
            call()
        assert refused.value.accepted == []
        assert 1 <= refused.value.retry_after_seconds <= 60
    assert store.counts()[JobState.QUEUED] == 8
    client.submit_many(configs(2, 8))
    with pytest.raises(QueueFull, match=r"10 jobs are queued.*CALOTYPE_MAX_QUEUED"):
        client.submit("one more", **FIELDS)
    drain(settings, store)
    assert len(client.submit_many(configs(10, 20))) == 10


def test_a_time_to_retry_comes_from_the_backlog() -> None:
    """Whoever waits for one place waits behind all others that do: not for the time of one job."""
    for pending, rate, seconds in (("100000", "50", 20.0), ("100000", "5", 60.0), ("100", "50", 1.0), ("9", "", 10.0)):
        full = queue_full(["full", "all", pending, "100000", rate], coming=1, accepted=())
        assert full.retry_after_seconds == seconds


def test_one_tenants_limit_does_not_touch_the_others(settings: Settings) -> None:
    client = limited(settings, max_queued=10, max_queued_per_tenant=4)
    client.submit_many(configs(4), tenant="busy")
    with pytest.raises(QueueFull, match="this tenant's jobs"):
        client.submit("more", tenant="busy", **FIELDS)
    client.submit_many(configs(4, 10), tenant="calm")


def test_a_repeated_submission_is_no_second_one_though_the_queue_is_full(settings: Settings) -> None:
    client = limited(settings, max_queued=1)
    first = client.submit("a", idempotency_key="k", **FIELDS)
    assert client.submit("a", idempotency_key="k", **FIELDS).id == first.id
    with pytest.raises(QueueFull, match="1 jobs are queued"):
        client.submit("b", idempotency_key="other", **FIELDS)
    first.cancel()
    second = client.submit("b", idempotency_key="other", **FIELDS)  # the refused one did not use its key up
    assert second.id != first.id


def test_who_submits_many_while_others_take_the_room_waits_and_loses_nothing(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room for 500 is there at first; then another takes 150 of it, until a worker has made room again."""
    client, other = limited(settings, max_queued=500), limited(settings, max_queued=500)
    run, steps, waits = client._store._run, iter(range(100)), []

    def between(name: str, arguments: Any) -> Any:
        if name == "create" and next(steps) == 1:
            other.submit_many(configs(150, 1000))
        return run(name, arguments)

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        drain(settings, store)

    monkeypatch.setattr(client._store, "_run", between)
    client._sleep = sleep
    handles = client.submit_many(configs(500))
    assert len({handle.id for handle in handles}) == 500
    assert len(waits) == 1
    assert all(record is not None for record in store.get_many([handle.id for handle in handles]))


def test_who_gives_up_in_the_middle_is_told_what_was_accepted(
    settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    client, other = limited(settings, max_queued=500), limited(settings, max_queued=500)
    client._clock, client._sleep = lambda: now[0], lambda seconds: now.__setitem__(0, now[0] + seconds)
    run, steps = client._store._run, iter(range(1000))

    def between(name: str, arguments: Any) -> Any:
        if name == "create" and next(steps) == 1:
            other.submit_many(configs(300, 1000))
        return run(name, arguments)

    monkeypatch.setattr(client._store, "_run", between)
    with pytest.raises(QueueFull, match="500 jobs are queued") as refused:
        client.submit_many(configs(500))
    assert 60 <= now[0] < 70
    assert len(refused.value.accepted) == 200
    assert all(record is not None for record in store.get_many(refused.value.accepted))


def test_twenty_at_once_do_not_exceed_the_limit(settings: Settings, store: JobStore) -> None:
    client = limited(settings, max_queued=30)

    def submit(number: int) -> int:
        try:
            return len(client.submit_many(configs(4, number * 4)))
        except QueueFull:
            return 0

    with ThreadPoolExecutor(20) as pool:
        accepted = sum(pool.map(submit, range(20)))
    assert accepted == 28
    assert store.counts()[JobState.QUEUED] == 28


def test_a_batch_is_larger_than_the_limit_and_goes_through(settings: Settings, store: JobStore) -> None:
    client = limited(settings, max_queued=50)
    client.submit_many(configs(50, 1000))
    with Dispatcher(settings), SimulatedWorker(settings):
        batch = client.batches.submit(configs(300), window=64)
        assert batch.wait(timeout=120).counts.succeeded == 300


def test_open_batches_are_bounded(settings: Settings) -> None:
    client = limited(settings, max_open_batches=3, max_open_batches_per_tenant=2)
    first = client.batches.submit(configs(1), tenant="busy")
    client.batches.submit(configs(1), tenant="busy")
    before = set(client._storage.list("batches/"))
    with pytest.raises(QueueFull, match="this tenant's batches are open"):
        client.batches.submit(configs(1), tenant="busy", idempotency_key="k")
    client.batches.submit(configs(1), tenant="calm")
    with pytest.raises(QueueFull, match="3 of batches are open"):
        client.batches.submit(configs(1), tenant="third")
    assert len(set(client._storage.list("batches/")) - before) == 1, "a refused batch leaves its manifest"
    client.batches.cancel(first.id)
    with Dispatcher(settings):
        until(lambda: client.batches.status(first.id).state.final)
        until(lambda: len(client._redis.zrange(client.batches._store.keys.open_batches, 0, -1)) < 3)
    client.batches.submit(configs(1), tenant="busy", idempotency_key="k")


def test_the_time_to_come_again_follows_from_the_pace(settings: Settings, store: JobStore, redis: Redis) -> None:
    client = limited(settings, max_queued=40)
    client.submit_many(configs(40))
    for rate, expected in (("8", 2.5), ("1000", 1.0), ("0.1", 60.0), ("0.0000", 10.0)):
        redis.hset(store.keys.completion_rate, "per_second", rate)
        with pytest.raises(QueueFull, match="40 jobs are queued") as refused:
            client.submit_many(configs(20, 100))
        assert refused.value.retry_after_seconds == expected


def test_the_reaper_notes_the_pace(settings: Settings, store: JobStore, redis: Redis) -> None:
    store.reap()
    assert redis.hget(store.keys.completion_rate, "per_second") in {b"", ""}
    redis.hset(store.keys.counts, "succeeded", "50")
    redis.hincrby(store.keys.completion_rate, "at", -20_000_000)
    redis.delete(store.keys.reaper)
    store.reap()
    assert float(redis.hget(store.keys.completion_rate, "per_second") or 0) == pytest.approx(2.5, rel=0.05)
    redis.delete(store.keys.counts)


# ---- the gateway


@pytest.fixture
def serve(servers: EmbeddedServers) -> Iterator[Callable[..., Gateway]]:
    started: list[Gateway] = []

    def start(limits: dict[str, int], **options: Any) -> Gateway:
        settings = own_settings(servers).model_copy(update=limits)
        gateway = Gateway(settings, **options)
        started.append(gateway)
        gateway.client._store.announce_model(CARD.model_copy(update={"features": frozenset(Feature)}))
        return gateway

    yield start
    for gateway in started:
        gateway.stop()


def test_the_gateway_answers_429_with_a_time_in_every_api(serve: Callable[..., Gateway]) -> None:
    gateway = serve({"max_queued": 2, "max_open_batches": 1}, dispatch=False)
    http = gateway.http
    for number in range(2):
        assert http.post("/v1/jobs", json=configs(1, number)[0]).status_code == 202
    ours = http.post("/v1/jobs", json=configs(1, 5)[0])
    openai = http.post("/v1/images/generations", json={"prompt": "cat", "model": "demo"})
    a1111 = http.post("/sdapi/v1/txt2img", json={"prompt": "cat", "width": 128, "height": 128})
    for answer in (ours, openai, a1111):
        assert answer.status_code == 429, answer.text
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert ours.json()["code"] == "queue_full"
    assert openai.json()["error"]["code"] == "queue_full"
    assert openai.json()["error"]["type"] == "rate_limit_error"
    assert "the queue is full" in a1111.json()["detail"]
    assert gateway.client.counts()[JobState.QUEUED] == 2
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/images/generations",
        "body": {"prompt": "c", "model": "demo"},
    }
    body = json.dumps(line).encode()
    file = http.post("/v1/files", files={"file": ("b.jsonl", body)}, data={"purpose": "batch"}).json()["id"]
    batch = {"input_file_id": file, "endpoint": "/v1/images/generations", "completion_window": "24h"}
    assert http.post("/v1/batches", json=batch).status_code == 200
    refused = http.post("/v1/batches", json=batch)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    with SimulatedWorker(gateway.settings, "demo.interactive"), SimulatedWorker(gateway.settings, "demo.bulk"):
        until(lambda: gateway.client.counts()[JobState.QUEUED] == 0)
    assert http.post("/v1/jobs", json=configs(1, 5)[0]).status_code == 202


def test_requests_that_wait_are_bounded_and_those_that_poll_are_not(serve: Callable[..., Gateway]) -> None:
    gateway = serve({}, max_waiting=2, dispatch=False)
    http = gateway.http
    job = http.post("/v1/jobs", json=configs(1)[0]).json()["id"]
    with http.stream("GET", f"/v1/jobs/{job}/events") as one, http.stream("GET", f"/v1/jobs/{job}/events") as two:
        assert (one.status_code, two.status_code) == (200, 200)
        waiting = [
            http.get(f"/v1/jobs/{job}/events"),
            http.post("/v1/images/generations", json={"prompt": "cat", "model": "demo"}),
            http.post("/sdapi/v1/txt2img", json={"prompt": "cat"}),
            http.post("/v1/jobs", json=configs(1, 1)[0], headers={"Prefer": "wait=30"}),
        ]
        assert [(answer.status_code, answer.headers.get("retry-after")) for answer in waiting] == [(429, "5")] * 4
        assert gateway.client.counts()[JobState.QUEUED] == 1, "what was refused was queued"
        assert http.get(f"/v1/jobs/{job}").status_code == 200
        assert http.post("/v1/jobs", json=configs(1, 1)[0]).status_code == 202

    def again() -> bool:
        with http.stream("GET", f"/v1/jobs/{job}/events") as stream:
            return stream.status_code == 200

    until(again)  # who has hung up no longer counts


# ---- Redis is out of memory


def test_without_memory_nothing_new_is_accepted_and_what_is_there_is_finished(tmp_path: Path) -> None:
    server = ValkeyServer.start(tmp_path)
    try:
        settings = Settings(redis_url=server.url, key_prefix="full:")
        redis = connect_redis(settings)
        store = JobStore(redis, key_prefix="full:")
        jobs = [ResolvedConfig.parse(fields) for fields in configs(4)]
        ids = store.create(jobs[:3])
        running = store.claim("demo.bulk", worker="w", lease_seconds=30)
        assert running is not None
        redis.config_set("maxmemory", 1)
        before = set(redis.keys())
        with pytest.raises(RedisUnavailable, match="CALOTYPE_MAX_QUEUED"):
            store.create(jobs[3:])
        assert set(redis.keys()) == before, "something was half-written"
        assert store.renew([running], lease_seconds=30) == set()
        assert store.commit(running, images=[image_of(running)], timings={})
        second = store.claim("demo.bulk", worker="w", lease_seconds=30)
        assert second is not None
        assert store.release(second)
        assert store.reap(who="w") is not None
        assert store.cancel(ids[2]) is JobState.CANCELLED
        redis.config_set("maxmemory", 0)
        [last] = store.create(jobs[3:])
        assert store.get(last).state is JobState.QUEUED
        check_store(store, redis)
        redis.close()
    finally:
        server.stop()
