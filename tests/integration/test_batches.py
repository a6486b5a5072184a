"""Batches on a real Valkey and a real S3: every line ends once, whatever happens to the dispatcher."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from standardwebhooks import Webhook

from calotype import (
    AsyncClient,
    BatchNotFound,
    BatchState,
    Client,
    Dispatcher,
    IdempotencyConflict,
    InvalidRequest,
    Lane,
    Settings,
    WaitTimeout,
)
from calotype.batches.record import BatchFormat
from calotype.resolver import Resolver
from calotype.testing import JobContext
from calotype.webhooks import tenant_secret
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.resolve import ResolvedConfig
from calotype_shared.storage.s3 import Storage
from tests.faults.harness import WorkerProcess
from tests.integration.conftest import Command, until
from tests.integration.test_fair_share import CARD
from tests.invariants import check_store
from tests.simulated import SimulatedWorker


@pytest.fixture
def client(settings: Settings, store: JobStore, redis: Redis) -> Iterator[Client]:
    store.announce_model(CARD)
    with Client(settings=settings) as client:
        yield client
    check_store(store, redis)


@pytest.fixture
def run(settings: Settings, client: Client) -> Iterator[None]:
    """A dispatcher and a simulated worker."""
    with SimulatedWorker(settings), Dispatcher(settings):
        yield


def lines(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"image {i}", "num_inference_steps": 5, "seed": i, **fields} for i in range(count)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_bad_lines_are_told_by_number_and_the_rest_runs(
    client: Client, run: None, tmp_path: Path, store: JobStore, redis: Redis, storage: Storage
) -> None:
    """A broken line costs nobody else anything; and nothing of the batch stays in Redis but its record."""
    rows: list[Any] = [
        {"custom_id": "first", "prompt": "a", "seed": 7, "quality": "fast"},
        "",
        "{not json",
        {"custom_id": "first", "prompt": "b"},
        {"prompt": "c", "width": 60},
        {"prompt": "d", "color": "red"},
        '["a list"]',
        {"prompt": "e", "model": "unheard-of"},
        {"prompt": "fail"},
        {"custom_id": 5, "prompt": "f"},
        {"custom_id": "\ud800", "prompt": "g"},
        '{"prompt": "h", "seed": NaN}',
        *lines(250),
    ]
    batch = client.batches.submit(write(tmp_path / "jobs.jsonl", rows), metadata={"for": "test"})
    record = batch.wait(120)
    assert (record.state, record.metadata) == (BatchState.COMPLETED, {"for": "test"})
    counts = record.counts
    assert (counts.total, counts.invalid, counts.succeeded, counts.failed) == (261, 9, 251, 1)
    assert (record.progress, record.seconds_left, counts.done) == (1.0, 0.0, 261)

    results = {result["custom_id"]: result for result in batch.results()}
    assert len(results) == 251
    assert results["first"]["line"] == 1
    assert results["first"]["images"][0]["seed"] == 7
    assert results["line-13"]["images"][0]["seed"] == 0
    errors = {error["line"]: error for error in batch.errors()}
    assert sorted(errors) == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    reported = {line: error["error"]["message"] for line, error in errors.items()}
    assert reported[3].startswith("line 3: line=b'{not json': is not JSON")
    assert "custom_id='first': was used by an earlier line" in reported[4]
    assert "width=60" in reported[5]
    assert "color=" in reported[6]
    assert "is not an object" in reported[7]
    assert "model='unheard-of'" in reported[8]
    assert (errors[9]["state"], errors[9]["error"]) == ("failed", {"code": "generation_failed", "message": "as asked"})
    assert "use a string of 1 to 512 characters" in reported[10]
    assert "custom_id='\\ud800'" in reported[11]
    assert "seed=nan" in reported[12]

    kept = {key.removeprefix(store.keys.prefix) for key in redis.scan_iter(f"{store.keys.prefix}*")}
    assert not [key for key in kept if key.startswith(("job:", "live:", "done:", "parts:", "leader:", "recent:"))]
    assert sorted(storage.list(f"batches/{batch.id}/")) == [
        f"batches/{batch.id}/{name}.jsonl" for name in ("errors", "manifest", "output")
    ]


def test_seeds_left_open_are_the_lines_own(client: Client, run: None) -> None:
    """Each line has another, and the result says which."""
    batch = client.batches.submit([{"prompt": "a"}, {"prompt": "a"}, "a"])
    batch.wait(120)
    assert len({result["images"][0]["seed"] for result in batch.results()}) == 3


def test_only_a_window_of_jobs_is_in_redis(client: Client, settings: Settings, store: JobStore, redis: Redis) -> None:
    """However long the manifest; and partial results can be read while it runs."""
    most = 0

    def look(_: JobContext | None = None) -> None:
        nonlocal most
        most = max(most, len(redis.keys(f"{store.keys.job('')}*")))  # at one moment, as a scan is not

    batch = client.batches.submit(lines(400), window=30)
    with SimulatedWorker(settings) as worker, Dispatcher(settings):
        worker.pause()
        worker.script = look
        until(lambda: batch.status().counts.queued == 30)
        look()
        assert batch.status().counts.waiting == 370
        worker.resume()
        until(lambda: next(batch.results(), None) is not None)
        assert batch.wait(120).counts.succeeded == 400
    assert most == 30
    assert len(list(batch.results())) == 400


def test_a_killed_dispatcher_loses_and_repeats_nothing(
    client: Client, settings: Settings, environment: dict[str, str], tmp_path: Path
) -> None:
    """Three of them die in mid-batch, without a word; the next carries on where the last one stopped."""
    batch = client.batches.submit(lines(3000), window=100)
    with SimulatedWorker(settings) as worker:
        for kill in (0, 300, 1200):
            dispatcher = subprocess.Popen([sys.executable, "-m", "calotype", "dispatcher"], env=environment)
            try:
                until(lambda goal=kill: len(worker.done) > goal or batch.status().state.final)  # type: ignore[misc]
            finally:
                dispatcher.send_signal(signal.SIGKILL)
                dispatcher.wait()
            assert not batch.status().state.final
            client._redis.delete(client._store.keys.leader(batch.id))  # as if its lease had run out
        with Dispatcher(settings), Dispatcher(settings):  # two at once, too
            record = batch.wait(120)
        assert len(worker.done) == len(set(worker.done)) == 3000
    assert (record.state, record.counts.succeeded) == (BatchState.COMPLETED, 3000)
    assert sorted(result["line"] for result in batch.results()) == list(range(1, 3001))


def test_a_replaced_dispatcher_can_write_nothing(client: Client, settings: Settings) -> None:
    """Its fence is old: neither jobs nor results nor states of it count."""
    from calotype.batches.store import BatchStore, LeadLost

    batches = BatchStore(client._redis, key_prefix=settings.key_prefix, retention_seconds=60)
    batch = client.batches.submit(lines(3))
    zombie = batches.lead(batch.id, who="zombie", lease_seconds=30)
    assert zombie is not None
    assert batches.lead(batch.id, who="heir", lease_seconds=30) is None
    client._redis.delete(client._store.keys.leader(batch.id))
    heir = batches.lead(batch.id, who="heir", lease_seconds=30)
    assert heir is not None
    for write in (
        lambda: batches.move(zombie, BatchState.IN_PROGRESS),
        lambda: batches.harvested(zombie, parts=["x"], job_ids=[]),
        lambda: batches.dispatch(zombie, [], start="0:0", end="0:1"),
    ):
        with pytest.raises(LeadLost, match=batch.id):
            write()
    batches.move(heir, BatchState.IN_PROGRESS)
    heir = batches.lead(batch.id, who="heir", lease_seconds=30)
    assert heir is not None
    config = ResolvedConfig(prompt="x", width=64, height=64, seed=1)
    jobs = [NewJob.of(config, lane=Lane.BULK, job_id=f"{batch.id}-1")]
    late = zombie.model_copy(update={"state": BatchState.IN_PROGRESS})
    for who, start in ((late, "0:0"), (heir, "0:1")):  # an old fence; the right one, but not from where the cursor is
        with pytest.raises(LeadLost, match=batch.id):
            batches.dispatch(who, jobs, start=start, end="0:2")
    assert batch.status().counts.queued == 0
    batches.dispatch(heir, jobs, start="0:0", end="0:1")
    assert (batch.status().counts.queued, batch.status().cursor) == (1, "0:1")
    assert client.batches.cancel(batch.id).state is BatchState.CANCELLING
    with pytest.raises(LeadLost, match=batch.id):
        batches.dispatch(heir, jobs, start="0:1", end="0:2")


def test_cancelling_is_not_stopped_by_a_job_that_a_dispatcher_has_tidied_away(
    client: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of live jobs and the cancelling of each, a dispatcher may have let one go that is final."""
    with Dispatcher(settings):
        batch = client.batches.submit(lines(20))
        until(lambda: batch.status().counts.queued == 20)
        listed = client.batches._store.live(batch.id)
        monkeypatch.setattr(client.batches._store, "live", lambda _: [f"{batch.id}-21", *listed])
        batch.cancel()
        assert batch.wait(timeout=120).counts.cancelled == 20


def test_cancelling_stops_what_waits_and_what_runs(client: Client, settings: Settings) -> None:
    """What was done stays; every other line is reported as cancelled; and a retry makes only those."""
    with SimulatedWorker(settings, limit=40), Dispatcher(settings):
        batch = client.batches.submit(lines(300), window=50)
        until(lambda: batch.status().counts.succeeded >= 20)
        batch.cancel()
        record = batch.wait(120)
    done = record.counts.succeeded
    assert record.state is BatchState.CANCELLED
    assert 20 <= done <= 40
    assert (record.counts.cancelled, record.counts.waiting, record.counts.queued) == (300 - done, 0, 0)
    assert len(list(batch.results())) == done
    errors = list(batch.errors())
    assert len({error["line"] for error in errors}) == len(errors) == 300 - done
    assert {error["error"]["code"] for error in errors} == {"batch_cancelled"}

    client._redis.hset(client._store.keys.batch(batch.id), "expires_after", 7200)
    again = batch.retry()
    assert again.status().expires_after == 7200, "what was asked for is kept"
    with SimulatedWorker(settings), Dispatcher(settings):
        retried = again.wait(120)
    assert (retried.retry_of, retried.counts.succeeded) == (batch.id, 300 - done)
    both = [result["custom_id"] for handle in (batch, again) for result in handle.results()]
    assert sorted(both) == sorted(f"line-{number}" for number in range(1, 301))
    with pytest.raises(InvalidRequest, match="has no failed lines"):
        again.retry()
    client._storage.delete(record.manifest)
    with pytest.raises(InvalidRequest, match="its input file has been deleted"):
        batch.retry()


def test_a_batch_expires_with_what_it_has(client: Client, settings: Settings) -> None:
    """Lines that were not done in time are reported as expired."""
    with SimulatedWorker(settings, limit=10), Dispatcher(settings):
        batch = client.batches.submit(lines(60), window=20, expires_in=3600)
        with pytest.raises(InvalidRequest, match="wait until it ends, or cancel it"):
            batch.retry()
        until(lambda: batch.status().counts.succeeded == 10)
        client._redis.hset(client._store.keys.batch(batch.id), "expires_at", 1)  # and now it is late
        record = batch.wait(120)
    assert record.state is BatchState.EXPIRED
    assert record.counts.succeeded == 10
    assert record.counts.expired + record.counts.cancelled == 50
    assert {error["error"]["code"] for error in batch.errors()} == {"batch_expired"}


@pytest.fixture
def slow_validation(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Ten lines a second, as with a slow storage that is asked for each line's upload; set when it has begun."""
    entered, new_job = threading.Event(), Resolver.new_job

    def slowly(*args: Any, **kwargs: Any) -> NewJob:
        entered.set()
        time.sleep(0.1)
        return new_job(*args, **kwargs)

    monkeypatch.setattr(Resolver, "new_job", slowly)
    return entered


@pytest.mark.slow
def test_a_long_validation_keeps_its_lead(
    client: Client, settings: Settings, slow_validation: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few of its lines a second takes."""
    monkeypatch.setattr("calotype.batches.run.LEASE_SECONDS", 4.0)
    with SimulatedWorker(settings), Dispatcher(settings):
        batch = client.batches.submit(lines(80))
        assert batch.wait(240).counts.succeeded == 80
    assert batch.status().fence == 1, "the lead was lost"


def test_a_batch_ends_while_it_is_validated(
    client: Client, settings: Settings, slow_validation: threading.Event
) -> None:
    """Expired or cancelled, it does not wait for its other lines."""
    with Dispatcher(settings):
        batch = client.batches.submit(lines(5000), expires_in=3600)
        slow_validation.wait(120)
        client._redis.hset(client._store.keys.batch(batch.id), "expires_at", 1)
        assert batch.wait(120).state is BatchState.EXPIRED
        slow_validation.clear()
        other = client.batches.submit(lines(5000))
        slow_validation.wait(120)
        other.cancel()
        assert other.wait(120).state is BatchState.CANCELLED


def test_a_paused_batch_sends_nothing(client: Client, settings: Settings) -> None:
    """What is in the queue runs; the rest waits until it is resumed."""
    with SimulatedWorker(settings) as worker, Dispatcher(settings):
        worker.pause()
        batch = client.batches.submit(lines(100), window=10)
        until(lambda: batch.status().counts.queued == 10)
        batch.pause()
        worker.resume()
        until(lambda: batch.status().counts.done >= 10 and batch.status().counts.queued == 0)
        assert (batch.status().paused, batch.status().counts.waiting) == (True, 90)
        batch.resume()
        assert batch.wait(120).counts.succeeded == 100


def test_paused_and_many_batches_do_not_keep_others_waiting(client: Client, settings: Settings) -> None:
    """However many one tenant has, paused or not, another's is led."""
    with SimulatedWorker(settings, limit=10) as worker, Dispatcher(settings):
        paused = [client.batches.submit(lines(20, seed=i), tenant="many", window=1) for i in range(10)]
        for batch in paused[:4]:
            batch.pause()
        until(lambda: len(worker.done) == 10)  # and now nobody works any more
        other = client.batches.submit(lines(3), tenant="other")
        until(lambda: other.status().counts.queued == 3)
        for batch in paused:
            batch.cancel()
        for batch in [*paused, other]:
            batch.cancel()
            assert batch.wait(120).state is BatchState.CANCELLED


def test_a_record_that_redis_lost_is_told(client: Client, settings: Settings) -> None:
    """As an error of its line, which a retry makes again."""
    batch = client.batches.submit(lines(3))
    with Dispatcher(settings):
        until(lambda: batch.status().counts.queued == 3)
    with SimulatedWorker(settings):
        until(lambda: batch.status().counts.succeeded == 3)
    client._redis.delete(client._store.keys.job(f"{batch.id}-2"))
    with Dispatcher(settings):
        record = batch.wait(120)
    assert record.state is BatchState.COMPLETED
    assert [(error["line"], error["error"]["code"]) for error in batch.errors()] == [(2, "record_lost")]
    with SimulatedWorker(settings), Dispatcher(settings):
        assert batch.retry().wait(120).counts.succeeded == 1


def test_useless_manifests_fail_with_the_reason(client: Client, run: None, storage: Storage) -> None:
    """Nothing in it, nothing of use in it, or not there any more."""
    empty = client.batches.submit([]).wait(120)
    assert (empty.state, empty.problem) == (BatchState.FAILED, "the manifest is empty")
    bad = client.batches.submit([{"prompt": "a", "width": 7}])
    record = bad.wait(120)
    assert (record.state, record.problem) == (BatchState.FAILED, "no line of the manifest can be used")
    assert [error["line"] for error in bad.errors()] == [1]
    lost = client.batches.submit_stored("files/nothing", input_file="file-x", format=BatchFormat.NATIVE).wait(120)
    assert "is missing in storage" in str(lost.problem)
    for options, said in (({"window": 0}, "window=0"), ({"expires_in": 0.5}, "expires_in=0.5")):
        with pytest.raises(InvalidRequest, match=said):
            client.batches.submit(lines(1), **options)
    with pytest.raises(InvalidRequest, match=r"give a pathlib\.Path"):
        client.batches.submit("jobs.jsonl")
    with pytest.raises(BatchNotFound, match="'batch_x'"):
        client.batches.cancel("batch_x")


def test_batches_are_listed_and_made_once(client: Client, run: None, storage: Storage) -> None:
    """The same key gives the same batch, and its second manifest is not kept."""
    first = client.batches.submit(lines(2), idempotency_key="night-1")
    assert client.batches.submit(lines(2), idempotency_key="night-1").id == first.id
    with pytest.raises(IdempotencyConflict, match=r"idempotency_key='night-1'.*different request"):
        client.batches.submit(lines(3), idempotency_key="night-1")
    second = client.batches.submit(lines(1))
    other = client.batches.submit(lines(1), tenant="other")
    for batch in (first, second, other):
        assert batch.wait(120).state is BatchState.COMPLETED
    assert [batch.id for batch in client.batches.list()] == [second.id, first.id]
    assert [batch.id for batch in client.batches.list(after=second.id)] == [first.id]
    assert [batch.id for batch in client.batches.list(tenant="other")] == [other.id]


def test_a_batch_through_a_real_worker(
    start_worker: Callable[..., WorkerProcess], settings: Settings, client: Client, storage: Storage
) -> None:
    """Real images, in storage where the results say they are."""
    start_worker()
    rows = [{"prompt": f"cat {i}", "model": "tiny", "num_inference_steps": 2 + i % 4} for i in range(24)]
    with Dispatcher(settings):
        batch = client.batches.submit([*rows, {"prompt": "cat", "model": "tiny", "sampler": "none"}], window=10)
        record = batch.wait(120)
    assert (record.counts.succeeded, record.counts.invalid) == (24, 1)
    for result in batch.results():
        [image] = result["images"]
        assert storage.get(image["key"])[:4] == b"\x89PNG"


def test_a_card_says_which_lines_fit(settings: Settings, store: JobStore, run: None) -> None:
    """A model's limits are those of its card when the batch is validated."""
    store.announce_model(ModelCard(**{**CARD.model_dump(), "name": "small", "max_pixels": 64 * 64}))
    with Client(settings=settings) as client:
        batch = client.batches.submit([{"prompt": "a", "model": "small", "width": 128, "height": 128}])
        assert batch.wait(120).state is BatchState.FAILED
        assert "use a smaller size" in next(batch.errors())["error"]["message"]


class Receiver(ThreadingHTTPServer):
    """A web server that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[dict[str, str], bytes]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((dict(self.headers), body))  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_webhooks_tell_of_jobs_and_batches(settings: Settings, store: JobStore) -> None:
    """Signed so that the receiver's own library believes them; refused where no secret is set."""
    secret = "a secret of at least thirty-two characters"
    chosen = settings.model_copy(update={"webhook_secret": SecretStr(secret), "webhook_allow_private": True})
    store.announce_model(CARD)
    with Receiver() as receiver, Client(settings=chosen) as client, SimulatedWorker(chosen), Dispatcher(chosen):
        job = client.submit("a", lane=Lane.BULK, webhook_url=receiver.url, metadata={"order": 7})
        batch = client.batches.submit(lines(3), webhook_url=receiver.url)
        until(lambda: len(receiver.received) == 2)
        reported = [
            Webhook(tenant_secret(secret, "default")).verify(body, headers) for headers, body in receiver.received
        ]
        by_type = {event["type"]: event["data"] for event in reported}
        assert by_type["job.succeeded"]["id"] == job.id
        assert by_type["job.succeeded"]["metadata"] == {"order": 7}
        assert by_type["batch.completed"]["id"] == batch.id
        assert by_type["batch.completed"]["counts"]["succeeded"] == 3
        receiver.shutdown()
    with Client(settings=settings) as client, pytest.raises(InvalidRequest, match="CALOTYPE_WEBHOOK_SECRET"):
        client.submit("a", webhook_url="https://example.com/hook")
    with Client(settings=settings.model_copy(update={"webhook_secret": SecretStr(secret)})) as client:
        for url in ("https://127.0.0.1/hook", "http://example.com/hook", "https://10.0.0.1/", "file:///etc/passwd"):
            with pytest.raises(InvalidRequest, match="webhook="):
                client.batches.submit(lines(1), webhook_url=url)


def test_the_command_leads_a_batch_to_its_end(
    client: Client, settings: Settings, calotype: Command, tmp_path: Path
) -> None:
    """Submit, wait, read the results; the exit status tells that a line failed."""
    batch = functools.partial(calotype, "batch")
    file = write(tmp_path / "jobs.jsonl", [*lines(5), {"prompt": "fail"}, {"prompt": "x", "width": 3}])
    with SimulatedWorker(settings):
        ran = batch("submit", str(file), "--wait", "--metadata", "night=1")
    assert ran.returncode == 1
    assert "7 of 7 lines done, 1 failed, 1 invalid" in ran.stdout
    batch_id = ran.stdout.split()[0]
    results = [json.loads(line) for line in batch("results", batch_id).stdout.splitlines()]
    assert [result["state"] for result in results] == ["succeeded"] * 5
    errors = [json.loads(line) for line in batch("results", batch_id, "--errors").stdout.splitlines()]
    assert sorted(error["line"] for error in errors) == [6, 7]
    shown = json.loads(batch("status", batch_id, "--json").stdout)
    assert (shown["state"], shown["metadata"]) == ("completed", {"night": "1"})
    assert batch_id in batch("list").stdout
    assert batch("status", "batch_x").returncode == 3


def test_the_same_from_asyncio(settings: Settings, store: JobStore, run: None) -> None:
    """Submitted, awaited, cancelled, without blocking the event loop."""
    store.announce_model(CARD)
    store.announce_model(CARD.model_copy(update={"name": "unserved"}))

    async def use() -> tuple[BatchState, int, BatchState]:
        async with AsyncClient(settings=settings) as client:
            batch = await client.batches.submit(lines(3))
            results = [line async for line in await batch.result(120)]
            assert [line["state"] for line in results] == ["succeeded"] * 3
            done = await batch.status()
            other = await client.batches.submit(lines(3, model="unserved"), expires_in=60)
            await client.batches.cancel(other)
            late = await client.batches.submit(lines(1), metadata={})
            with pytest.raises(WaitTimeout, match="calotype dispatcher"):
                await client.batches.wait(late, 0)
            [first, _] = await client.batches.wait(batch for batch in (other, late.id))
            return done.state, done.counts.succeeded, first.state

    state, succeeded, other = asyncio.run(use())
    assert (state, succeeded) == (BatchState.COMPLETED, 3)
    assert other is BatchState.CANCELLED
