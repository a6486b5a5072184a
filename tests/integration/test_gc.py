"""What a collection removes and what it leaves, on a real Valkey and a real S3, while others are at work."""

from __future__ import annotations

import functools
import io
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from redis import Redis

from calotype import Client, Dispatcher, InvalidRequest, JobState, Lane, Settings
from calotype.cli.app import main
from calotype.files import FileStore
from calotype.gc import Collector, GcRefused, Kind, Report
from calotype.gc.bloom import BloomFilter
from calotype.testing import ScriptedWorker
from calotype_shared.queue.job_store import Claim, JobStore
from calotype_shared.schema.jobs import JobError, new_job_id
from calotype_shared.storage.images import upload_key
from calotype_shared.storage.layout import sidecar_key
from calotype_shared.storage.s3 import Storage
from tests.integration.conftest import until
from tests.integration.test_fair_share import CARD, take
from tests.invariants import check_bucket, check_store
from tests.simulated import image_of

SERVED = CARD.model_copy(update={"features": frozenset({"text_to_image", "image_to_image"})})
AT_ONCE = -2.0  # seconds: whatever is there is old enough


@pytest.fixture
def client(settings: Settings, store: JobStore, redis: Redis) -> Iterator[Client]:
    store.announce_model(SERVED)
    with Client(settings=settings.model_copy(update={"reuse_finished": True})) as client:
        yield client
    check_store(store, redis)


def collector(settings: Settings, redis: Redis, storage: Storage, **changes: Any) -> Collector:
    ages = {"retention_seconds": AT_ONCE, "safe_seconds": AT_ONCE, "older_than_seconds": AT_ONCE}
    names = {"key_prefix": settings.key_prefix, "bucket": settings.s3_bucket}
    return Collector(redis, storage, **{**names, **ages, **changes})


def sample_image(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def draw(storage: Storage, claim: Claim) -> None:
    storage.put(image_of(claim).key, b"image", "image/png")
    storage.put(sidecar_key(claim.folder, 0), b"{}", "application/json")


def finish(store: JobStore, storage: Storage) -> str:
    """The next job, done."""
    claim = take(store)
    draw(storage, claim)
    assert store.commit(claim, images=[image_of(claim)], timings={})
    return claim.job_id


def a_bucket_full(client: Client, settings: Settings, store: JobStore, storage: Storage, redis: Redis) -> set[str]:
    """Of everything that there can be, what is wanted and what is not. Returns the keys of the latter."""
    garbage: set[str] = set()

    def leave(key: str) -> None:
        storage.put(key, b"nobody's", "application/octet-stream")
        garbage.add(key)

    fields: dict[str, Any] = {"lane": Lane.BULK, "num_inference_steps": 5}
    # Done: its own images, and what an attempt left that was lost with its worker.
    done = client.submit("a", seed=1, **fields).id
    finish(store, storage)
    leave(f"{done}/7-00000000/0.png")
    # Its images are another's too, whose record lives longer.
    first = client.submit("b", seed=2, **fields).id
    finish(store, storage)
    assert client.submit("b", seed=2, **fields).status().leader == "storage"
    redis.delete(store.keys.job(first))
    # Or those of equal ones to come.
    second = client.submit("c", seed=3, **fields).id
    finish(store, storage)
    redis.delete(store.keys.job(second))
    # Gone for good; failed half-way; being made; in line with a source image.
    third = client.submit("d", **fields).id
    finish(store, storage)
    garbage |= set(storage.list(f"{third}/"))
    redis.delete(store.keys.job(third))
    client.submit("e", **fields)
    claim = take(store)
    leave(f"{claim.folder}/0.png")
    store.fail(claim, JobError(code="bad", message="no"), retry=False)
    running = client.submit("f", **fields)
    storage.put(f"{take(store).folder}/0.png", b"half", "image/png")
    assert running.status().state is JobState.RUNNING
    client.submit("g", init_image=sample_image("red"), **fields)
    leave(upload_key(client.upload(sample_image("blue"))))
    # Batches: done, with equal lines and what its dispatcher did not get to; gone; not done, with a source image.
    line = {"prompt": "h", "num_inference_steps": 5, "model": "demo"}
    batch = client.batches.submit([{**line, "seed": 1}, {**line, "seed": 1}, line, {**line, "width": 60}])
    expired = client.batches.submit([{**line, "seed": 9}])
    upload = client.upload(sample_image("green"))
    waiting = client.batches.submit([{**line, "init_image": upload}], tenant="waits")
    waiting.pause()
    with ScriptedWorker(settings, [SERVED]), Dispatcher(settings):
        batch.wait(120)
        expired.wait(120)
    leave(f"batches/{batch.id}/plan-{new_job_id()}/jobs-000001.jsonl")
    leave(f"batches/{batch.id}/parts/{new_job_id()}.output.jsonl")
    redis.delete(store.keys.batch(expired.id))
    garbage |= {*storage.list(f"batches/{expired.id}/"), *storage.list(f"{expired.id}-1/")}
    # By HTTP, and by links that nobody completed.
    files = FileStore(redis, storage, key_prefix=settings.key_prefix)
    files.add(io.BytesIO(b"{}"), tenant="acme", filename="x", purpose="batch")
    leave("files/acme/file-0123456789abcdef01234567")
    leave(f"incoming/acme/{'x' * 43}")
    storage.put("foreign/backup.tar", b"not ours", "application/x-tar")
    return garbage


@pytest.fixture
def garbage(client: Client, settings: Settings, store: JobStore, storage: Storage, redis: Redis) -> set[str]:
    return a_bucket_full(client, settings, store, storage, redis)


def test_only_what_nothing_refers_to_goes(
    settings: Settings, store: JobStore, storage: Storage, redis: Redis, garbage: set[str], client: Client
) -> None:
    """All of it, said beforehand, once; two at a time do no harm; and the indexes know nothing that is gone."""
    before = set(storage.list())
    assert garbage < before
    reported = collector(settings, redis, storage).run(dry_run=True)
    assert set(storage.list()) == before
    reports: list[Report] = []
    two = [threading.Thread(target=lambda: reports.append(collector(settings, redis, storage).run())) for _ in range(2)]
    for thread in two:
        thread.start()
    for thread in two:
        thread.join()
    left = set(storage.list()) - {"calotype-gc.json"}
    assert before - left == garbage
    check_bucket(store, redis, storage)
    assert len(reports) == 2
    for kind in (Kind.IMAGES, Kind.UPLOADS, Kind.INCOMING, Kind.FILES, Kind.BATCHES, Kind.INDEX):
        assert reported[kind].removed > 0, kind
        assert max(report[kind].removed for report in reports) == reported[kind].removed, kind
    assert reported[Kind.FOREIGN].kept == 1
    assert sum(reported[kind].removed for kind in Kind if kind is not Kind.INDEX) == len(garbage)
    assert reported.removed_bytes > 0
    again = collector(settings, redis, storage).run()
    assert (again.removed, again.removed_bytes) == (0, 0)
    assert {record.id for record in client.jobs()} == {
        key.removeprefix(store.keys.job("")) for key in redis.scan_iter(store.keys.job("*"))
    }, "the list of jobs names those there are"


@pytest.fixture
def command(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `calotype gc` in this process; its exit status, and what it says."""
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str, answer: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        capsys.readouterr()
        status = main(["gc", *arguments])
        return (status, *capsys.readouterr())

    return run


def test_nothing_young_goes_by_the_command(
    storage: Storage, command: Callable[..., tuple[int, str, str]], garbage: set[str]
) -> None:
    """An upload in flight looks like garbage: whatever is younger than an hour stays, and less cannot be asked for."""
    before = set(storage.list())
    status, out, err = command("--yes", "--json")
    assert status == 0, err
    said = json.loads(out)["by_kind"]
    assert sum(said[kind]["removed"] for kind in said if kind != "index") == 0
    assert sum(said[kind]["young"] for kind in said) == len(before) - 1, "all but the foreign one"
    assert set(storage.list()) == {*before, "calotype-gc.json"}
    for age, problem in (("59m", "too short"), ("soon", "is not a valid age")):
        status, out, err = command("--older-than", age)
        assert (status, out) == (2, "")
        assert problem in err
    status, out, err = command("--dry-run", "--older-than", "7d")
    assert (status, "0 would remove, 0 B" in err) == (0, True)


def test_it_asks_before_it_removes(
    store: JobStore, redis: Redis, client: Client, command: Callable[..., tuple[int, str, str]]
) -> None:
    """And a no is a no."""
    job = client.submit("x", lane=Lane.BULK)
    redis.zadd(store.keys.dead, {"gone": 1})
    status, _, err = command(answer="n\n")
    assert (status, "remove 1 objects and entries?" in err) == (130, True)
    assert redis.zcard(store.keys.dead) == 1
    status, _, err = command(answer="y\n")
    assert (status, "1 removed" in err) == (0, True)
    assert redis.zcard(store.keys.dead) == 0
    assert job.status().state is JobState.QUEUED


class Interrupted(Storage):
    """Lets something happen before a call of a name, for a key with these words, once."""

    def __init__(self, settings: Settings, call: str, words: str, happens: Callable[[], None]) -> None:
        super().__init__(settings)
        original = getattr(self, call)
        waiting = [happens]

        def interrupted(*arguments: Any, **options: Any) -> Any:
            if waiting and words in str(arguments):
                waiting.pop()()
            return original(*arguments, **options)

        setattr(self, call, interrupted)


def test_an_image_that_is_uploaded_anew_meanwhile_stays(
    settings: Settings, store: JobStore, redis: Redis, storage: Storage, client: Client
) -> None:
    """Its key is the same, and was old and unused when it was listed."""
    client.submit("x", lane=Lane.BULK)
    ids = [client.upload(sample_image(color)) for color in ("blue", "green")]
    old = 3.0
    until(lambda: all((storage.age(upload_key(found)) or 0) > old + 1 for found in ids))

    def upload_again() -> None:
        with Client(settings=settings) as other:
            other.upload(sample_image("blue"))

    slow = Interrupted(settings, "age", ids[0], upload_again)
    report = collector(settings, redis, slow, retention_seconds=old).run()
    assert (report[Kind.UPLOADS].removed, report[Kind.UPLOADS].young) == (1, 1)
    assert [storage.exists(upload_key(found)) for found in ids] == [True, False]


def test_an_upload_is_renewed_when_it_is_used(
    settings: Settings, store: JobStore, redis: Redis, storage: Storage, client: Client
) -> None:
    """Long before a collection would take it; and one that it took is reported as missing, not queued."""
    upload = client.upload(sample_image("blue"))
    client._resolver._renewed_after = 1.0
    client._resolver._uploaded.clear()
    until(lambda: (storage.age(upload_key(upload)) or 0) > 2)
    client.submit("x", init_image=upload, lane=Lane.BULK)
    assert (storage.age(upload_key(upload)) or 0) <= 2
    storage.delete(upload_key(upload))
    client._resolver._uploaded.clear()
    with pytest.raises(InvalidRequest, match="does not exist"):
        client.submit("x", init_image=upload, lane=Lane.BULK)


def test_a_job_that_is_committed_and_forgotten_meanwhile_keeps_its_images(
    settings: Settings, store: JobStore, redis: Redis, storage: Storage, client: Client
) -> None:
    """It was running when the records were read; by the time its images are met only its batch's results name it."""
    batch = client.batches.submit([{"prompt": "x", "num_inference_steps": 5}])
    with Dispatcher(settings):
        until(lambda: store.depths().get("demo.bulk", 0) == 1)
        claim = take(store)
        draw(storage, claim)

        def commit() -> None:
            assert store.commit(claim, images=[image_of(claim)], timings={})
            batch.wait(120)
            assert redis.exists(store.keys.job(claim.job_id)) == 0

        report = collector(settings, redis, Interrupted(settings, "pages", "", commit)).run()
    assert batch.status().counts.succeeded == 1, "nothing happened meanwhile"
    assert report[Kind.IMAGES].removed == 0
    check_bucket(store, redis, storage)


def test_a_batch_that_is_finished_while_its_parts_are_read_keeps_its_images(
    settings: Settings, store: JobStore, redis: Redis, storage: Storage, client: Client
) -> None:
    """Its parts vanish under the reader, who turns to the joined results."""
    batch = client.batches.submit([{"prompt": str(i), "num_inference_steps": 5} for i in range(4)], window=2)
    with ScriptedWorker(settings, [SERVED]):
        with Dispatcher(settings):
            until(lambda: redis.exists(store.keys.parts(batch.id)))
            batch.pause()
        until(lambda: redis.scard(store.keys.live(batch.id)) == 0)

        def go_on() -> None:
            batch.resume()
            with Dispatcher(settings):
                batch.wait(120)

        report = collector(settings, redis, Interrupted(settings, "get_range", "/parts/", go_on)).run()
    assert report[Kind.IMAGES].removed == 0
    assert batch.status().counts.succeeded == 4
    check_bucket(store, redis, storage)


def test_a_redis_that_has_lost_its_data_wipes_nothing(
    settings: Settings, store: JobStore, redis: Redis, storage: Storage, client: Client
) -> None:
    """Empty from the start, emptied later, an older copy, or another deployment's: each is refused, unless forced."""

    def refused(problem: str, **changes: Any) -> None:
        before = set(storage.list())
        with pytest.raises(GcRefused, match=problem):
            collector(settings, redis, storage, **changes).run()
        assert set(storage.list()) == before

    leftover = f"{new_job_id()}/1-00000000/0.png"
    storage.put(leftover, b"nobody's", "image/png")
    refused("has no record of any job or batch")
    assert collector(settings, redis, storage).run(dry_run=True).removed == 1
    client.submit("x", lane=Lane.BULK)
    assert collector(settings, redis, storage).run().removed == 1
    storage.put(leftover, b"nobody's", "image/png")
    refused("the bucket has recorded earlier collections, and it has not", key_prefix="other:")
    refused("its last collection was for the bucket", bucket="elsewhere")
    copy: Any = redis.hgetall(store.keys.gc)
    collector(settings, redis, storage, older_than_seconds=1e6, retention_seconds=1e6).run()
    newest: Any = redis.hgetall(store.keys.gc)
    redis.hset(store.keys.gc, mapping=copy)
    refused("has recorded 1 collections and the bucket 2: it is an older copy")
    redis.hset(store.keys.gc, mapping={**newest, "name": "another"})
    refused("the bucket belongs to another Redis")
    kept = storage.get("calotype-gc.json")
    storage.delete("calotype-gc.json")
    redis.hset(store.keys.gc, mapping=newest)
    refused("it has recorded earlier collections, and the bucket has not")
    storage.put("calotype-gc.json", kept, "application/json")
    redis.delete(store.keys.gc)
    refused("the bucket has recorded earlier collections, and it has not")
    assert collector(settings, redis, storage).run(force=True).removed == 1
    assert collector(settings, redis, storage).run().removed == 0, "from now on it is right again"


def test_uploads_in_parts_that_nobody_completes_are_ended(
    settings: Settings, redis: Redis, storage: Storage, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a day."""
    client.submit("x", lane=Lane.BULK)
    upload = storage.begin_upload("batches/batch_x/manifest.jsonl", "application/jsonl")
    storage.upload_part("batches/batch_x/manifest.jsonl", upload, 1, b"x" * 100)
    assert collector(settings, redis, storage).run()[Kind.UNFINISHED].young == 1
    monkeypatch.setattr("calotype.gc.collector._DAY", AT_ONCE)
    assert collector(settings, redis, storage).run()[Kind.UNFINISHED].removed == 1
    assert list(storage.unfinished_uploads()) == []


def test_many_pages_are_looked_at_and_removed(
    settings: Settings, redis: Redis, storage: Storage, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one call lists, and more than one deletes."""
    client.submit("x", lane=Lane.BULK)
    for number in range(110):
        storage.put(f"incoming/acme/{number:043}", b"x", "image/png")
    s3 = storage._client()
    monkeypatch.setattr(s3, "list_objects_v2", functools.partial(s3.list_objects_v2, MaxKeys=40))
    monkeypatch.setattr("calotype.gc.collector._DELETE", 25)
    report = collector(settings, redis, storage).run()
    assert report[Kind.INCOMING].removed == 110
    assert list(storage.list("incoming/")) == []


def test_a_bloom_filter_forgets_nothing() -> None:
    """And errs about few others; each about other ones."""
    filters = [BloomFilter(bits=2**14) for _ in range(2)]
    for known in filters:
        for number in range(1000):
            known.add(f"in {number}")
        assert all(f"in {number}" in known for number in range(1000))
    wrong = [{n for n in range(10_000) if f"out {n}" in known} for known in filters]
    assert all(0 < len(found) < 500 for found in wrong)
    assert len(wrong[0] & wrong[1]) < min(map(len, wrong)) / 2
