"""Two versions side by side on one Redis: what each writes, leaves to the other, and does."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from calotype import Client, InvalidRequest, Settings, WaitTimeout
from calotype.batches.store import BatchStore
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.records import SCHEMA
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobError
from calotype_shared.schema.worker_info import WorkerInfo
from tests.golden_records import FORMS, PLAIN, written
from tests.integration.test_fair_share import CARD, IMAGE, take
from tests.invariants import check_store

_VOLATILE = re.compile(r"\w+_at|token|tag|leader")  # differ from run to run


class NewerStore(JobStore):
    """The store of the next version."""

    schema = SCHEMA + 1


@pytest.fixture
def newer(settings: Settings, redis: Redis) -> JobStore:
    return NewerStore(redis, key_prefix=settings.key_prefix)


@pytest.fixture
def client(settings: Settings, store: JobStore, redis: Redis) -> Iterator[Client]:
    store.announce_model(CARD)
    with Client(settings=settings) as client:
        yield client
    check_store(store, redis)


def test_what_is_written_is_what_the_files_say(settings: Settings, redis: Redis) -> None:
    """The scripts and models of this version write the forms of this schema's folder, field by field.

    A field may be added that others can do without; whatever else differs needs a new schema and a new folder.
    """
    found = written(settings, redis)
    files = {file.stem: json.loads(file.read_text()) for file in (FORMS / f"v{SCHEMA}").glob("*.json")}
    assert found.keys() == files.keys()
    for name, form in files.items():
        assert not list(_differences(form, found[name], exactly=name.startswith(("config", "plan", "message")))), name


@pytest.mark.parametrize(
    ("old", "new", "exactly", "said"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, False, "/a/b: 1 became 2"),
        ({"a": 1}, {}, False, "/a is gone"),
        ({"token": "0a-1"}, {"token": "0a1"}, False, "/token: 0a-1 became 0a1"),
        ({"ended_at": 1.5}, {"ended_at": None}, False, "/ended_at: 1.5 became None"),
        ({"history": '[{"how": "lost"}]'}, {"history": '[{"how": "gone"}]'}, False, "/how: lost became gone"),
        ({"a": 1}, {"a": 1, "b": 2}, True, ": {'b'}"),
    ],
)
def test_a_form_that_differs_is_noticed(old: Any, new: Any, exactly: bool, said: str) -> None:
    """The control: a value, a field that is gone, another sort of token, an older attempt, a field too many."""
    assert list(_differences(old, new, exactly=exactly)) == [said]
    assert list(_differences(old, old, exactly=exactly)) == []


def test_a_time_on_a_full_second_is_a_time() -> None:
    assert (
        list(_differences({"ended_at": 1.5, "started_at": "1.5"}, {"ended_at": 2, "started_at": "2"}, exactly=True))
        == []
    )


def _differences(old: Any, new: Any, *, exactly: bool, at: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if exactly and old.keys() != new.keys():
            yield f"{at}: {old.keys() ^ new.keys()}"
        for name, value in old.items():
            if name not in new:
                yield f"{at}/{name} is gone"
            elif _VOLATILE.fullmatch(name):
                shape = _is_time if name.endswith("_at") else _shape
                if shape(value) != shape(new[name]):
                    yield f"{at}/{name}: {value} became {new[name]}"
            elif name == "history":
                yield from _differences(json.loads(value)[-1], json.loads(new[name])[-1], exactly=exactly, at=at)
            else:
                yield from _differences(value, new[name], exactly=exactly, at=f"{at}/{name}")
    elif old != new:
        yield f"{at}: {old} became {new}"


def _is_time(value: object) -> bool:
    """Whether it is seconds since the epoch, as a number or a text; on a full second there is no fraction."""
    return re.fullmatch(r"\d+(\.\d+)?", str(value)) is not None


def _shape(value: object) -> str:
    """A text with its characters masked, or the type of a number."""
    return re.sub(r"\w", "x", value) if isinstance(value, str) else type(value).__name__


def test_a_record_of_every_schema_is_worked_on(store: JobStore, redis: Redis) -> None:
    """What an older producer left in the queue is done by this worker."""
    for number, folder in enumerate(sorted(FORMS.iterdir())):
        fields = json.loads((folder / "job-queued.json").read_text())
        job_id = f"{number:026}"
        redis.hset(store.keys.job(job_id), mapping=fields)
        redis.zadd(store.keys.waiting("demo.bulk"), {job_id: 1})
        claim = take(store)
        assert claim.job_id == job_id
        assert store.commit(claim, images=[IMAGE], timings={})
        assert store.get(job_id).state is JobState.SUCCEEDED


def test_an_old_worker_passes_what_is_too_new_and_a_new_one_does_both(
    store: JobStore, newer: JobStore, redis: Redis, client: Client
) -> None:
    """However many stand before its own: the old ones in turn, while the new stay where they are, in their order."""
    ahead = newer.create([PLAIN] * 1200, tenant="eager")  # more than one claim looks at
    mine = store.create([PLAIN] * 3, tenant="later", max_failures=1)
    [last] = newer.create([PLAIN])
    redis.zadd(store.keys.waiting("demo.bulk"), {job_id: 1e6 + n for n, job_id in enumerate(mine)})  # behind all
    assert store.left_for_newer(["demo.bulk", "demo.interactive"]) == {"demo.bulk": SCHEMA + 1}
    assert store.claim("demo.bulk", worker="w", lease_seconds=20) is None, "so far it has not looked"
    assert [take(store).job_id for _ in mine] == mine
    assert store.claim("demo.bulk", worker="w", lease_seconds=20) is None
    [returned] = store.create([PLAIN])
    redis.zadd(store.keys.waiting("demo.bulk"), {returned: 100})  # where a job comes back to: before what was passed
    assert take(store).job_id == returned
    assert store.left_for_newer(["demo.bulk"]) == {"demo.bulk": SCHEMA + 1}
    assert newer.left_for_newer(["demo.bulk"]) == {}
    [own] = store.create([PLAIN])
    redis.zadd(store.keys.waiting("demo.bulk"), {own: 1})
    line = redis.zrange(store.keys.waiting("demo.bulk"), 0, 9)
    assert line[0] == own
    assert {*line[1:]} < {*ahead, last}
    assert [take(newer).job_id for _ in line] == line


def test_an_old_client_follows_cancels_and_lists_a_new_job(client: Client, newer: JobStore, store: JobStore) -> None:
    """It only does not submit it again, for it would not be the same."""
    done, failed, waiting = newer.create([PLAIN] * 3)
    assert newer.commit(take(newer), images=[IMAGE], timings={})
    assert newer.fail(take(newer), JobError(code="bad", message="no"), retry=False)
    assert client.wait(done, 120).images == (IMAGE,)
    assert client.status(waiting).newer
    assert {record.id for record in client.jobs()} == {done, failed, waiting}
    assert [record.id for record in client.dead_jobs.list()] == [failed]
    with pytest.raises(InvalidRequest, match=r"was written by a newer version \(schema 2\).* upgrade this process"):
        client.dead_jobs.retry(failed)
    assert client.cancel(waiting) is JobState.CANCELLED


def test_a_waiting_client_is_warned_that_every_worker_is_too_old(
    settings: Settings, newer: JobStore, client: Client
) -> None:
    """Not that there is none."""
    [job_id] = newer.create([PLAIN])
    info = WorkerInfo(name="w", model="demo", device="cpu", host="h", pid=1, version="1", started_at=1.0)
    newer.announce_worker(info, ttl_seconds=60)
    reported: list[str] = []
    with (
        Client(settings=settings, on_warning=reported.append) as listening,
        pytest.raises(WaitTimeout, match="every live worker of 'demo' is of an older version than the job"),
    ):
        listening.wait(job_id, 0.3)
    assert reported == [
        "every live worker of 'demo' is of an older version than the job: it stays queued until one of a newer version "
        "is there; upgrade the workers"
    ]
    newer.announce_worker(info.model_copy(update={"name": "w2", "schema_number": SCHEMA + 1}), ttl_seconds=60)
    with pytest.raises(WaitTimeout, match="wait longer, or cancel"):
        client.wait(job_id, 0.1)
    client.cancel(job_id)


def test_an_old_dispatcher_leaves_a_new_batch_alone(
    settings: Settings, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so once."""

    class NewerBatches(BatchStore):
        schema = SCHEMA + 1

    old, new = (
        kind(redis, key_prefix=settings.key_prefix, retention_seconds=60) for kind in (BatchStore, NewerBatches)
    )
    options = {"lane": Lane.BULK.value, "format": "native", "window": "5", "manifest": "m"}
    new.create("batch_1", tenant="t", fields=options)
    old.create("batch_2", tenant="t", fields=options)
    with caplog.at_level(logging.WARNING):
        assert [old.lead("batch_1", who="old", lease_seconds=20) for _ in range(3)] == [None] * 3
    assert [record.message for record in caplog.records] == ["batch waits for a newer dispatcher"]
    assert old.get("batch_1").state.value == "validating"
    assert [batch.id for batch in old.newest(tenant="t")] == ["batch_2", "batch_1"]
    for batch_id in ("batch_1", "batch_2"):
        assert new.lead(batch_id, who="new", lease_seconds=20)
