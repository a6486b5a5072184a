"""The client against a real Valkey and a real S3 server; the store's own methods play the worker."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from PIL import Image

from calotype import AsyncClient, Client, GenerationConfig, JobHandle, Lane
from calotype_shared.errors import (
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobNotFound,
    RedisUnavailable,
    StorageUnavailable,
    UnknownModel,
    WaitTimeout,
)
from calotype_shared.queue.job_store import Claim, JobStore
from calotype_shared.queue.keys import queue_name
from calotype_shared.schema.enums import JobState, OutputFormat, SamplerType
from calotype_shared.schema.jobs import ImageRef, JobError
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.worker_info import WorkerInfo
from calotype_shared.settings import Settings
from calotype_shared.storage.layout import image_key
from calotype_shared.storage.s3 import Storage

CARD = ModelCard(
    name="demo",
    family="sd",
    version="test",
    size_multiple=32,
    native_sizes=((128, 128), (160, 96)),
    max_pixels=256 * 256,
    max_prompt_tokens=32,
    samplers=tuple(SamplerType),
)


@pytest.fixture
def client(settings: Settings, store: JobStore) -> Iterator[Client]:
    """A client of this test's corner, where the model `demo` has been announced."""
    store.announce_model(CARD)
    with Client(settings=settings) as client:
        yield client


def claim(store: JobStore, job_id: str) -> Claim:
    record = store.get(job_id)
    claimed = store.claim(queue_name(record.config.models, record.lane), worker="test-worker", lease_seconds=30)
    assert claimed is not None
    assert claimed.job_id == job_id, "another job is before it in line"
    return claimed


def finish(store: JobStore, storage: Storage, job_id: str) -> None:
    """Do what a worker does with a job, with a plain red image for each image."""
    claimed = claim(store, job_id)
    config = claimed.config
    refs = []
    for index in range(config.num_images):
        buffer = io.BytesIO()
        Image.new("RGB", (config.width, config.height), (200, index, 0)).save(buffer, "PNG")
        data = buffer.getvalue()
        key = image_key(claimed.folder, index, OutputFormat.PNG)
        storage.put(key, data, "image/png")
        refs.append(
            ImageRef(
                key=key,
                seed=config.seed + index,
                width=config.width,
                height=config.height,
                content_type="image/png",
                bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
    store.progress([(claimed, 3, 10)])
    assert store.commit(claimed, images=refs, timings={"denoise": 0.5})


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_submitted_job_is_complete_and_queued(client: Client, store: JobStore) -> None:
    """What is stored has its seed and size filled in; an explicit seed is kept."""
    job = client.submit("a red circle", num_inference_steps=5, metadata={"for": "test"})
    record = store.get(job.id)
    assert record.state is JobState.QUEUED
    assert record.lane is Lane.INTERACTIVE
    assert record.metadata == {"for": "test"}
    assert (record.config.width, record.config.height) == (128, 128)
    assert client.submit("a red circle", seed=7).status().config.seed == 7


def test_a_quality_preset_fills_in_what_was_not_said(client: Client) -> None:
    """The preset sets steps and guidance; a field given beside it wins."""
    fast = client.submit("a red circle", quality="fast").status().config
    assert (fast.num_inference_steps, fast.guidance_scale) == (20, 7.0)
    mixed = client.submit("a red circle", quality="fast", guidance_scale=3.0).status().config
    assert (mixed.num_inference_steps, mixed.guidance_scale) == (20, 3.0)
    with pytest.raises(InvalidRequest, match="balanced"):
        client.submit("a red circle", quality="best")


def test_images_come_back_as_they_were_stored(
    client: Client, store: JobStore, storage: Storage, tmp_path: Path
) -> None:
    """A waited-for job gives its images, in order, decodable, savable, and by link."""
    job = client.submit("a red circle", num_images=2, seed=40, width=160)
    worker = in_background(lambda: finish(store, storage, job.id))
    images = job.result(timeout=120)
    worker.join()
    assert [image.ref.seed for image in images] == [40, 41]
    assert [image.image.getpixel((5, 5)) for image in images] == [(200, 0, 0), (200, 1, 0)]
    assert images[0].image.size == (160, 96)
    saved = images[1].save(tmp_path)
    assert saved.name == f"{job.id}-1.png"
    assert saved.read_bytes() == images[1].data
    assert images[0].save(tmp_path / "new" / "red.png").read_bytes() == images[0].data
    with urlopen(job.urls()[0], timeout=10) as answer:
        assert answer.read() == images[0].data


def test_an_image_that_was_overwritten_is_refused(client: Client, store: JobStore, storage: Storage) -> None:
    """Bytes that differ from the record's digest are never handed out as the job's image."""
    job = client.submit("a red circle")
    finish(store, storage, job.id)
    storage.put(job.status().images[0].key, b"something else", "image/png")
    with pytest.raises(StorageUnavailable, match="not what was stored"):
        job.images()


def test_submit_many_keeps_order_and_uses_the_bulk_lane(client: Client, store: JobStore) -> None:
    """Handles come in the order of the configs, which may be configs, prompts or fields."""
    configs: list[GenerationConfig | str | dict[str, Any]] = [
        GenerationConfig(prompt="a red circle", seed=1),
        "a blue star",
        {"prompt": "a green ring", "quality": "high"},
        *(f"image {number}" for number in range(300)),
    ]
    jobs = client.submit_many(configs)
    assert len({job.id for job in jobs}) == 303
    records = store.get_many([job.id for job in jobs])
    prompts = [record.config.prompt for record in records if record is not None]
    assert prompts[:3] == ["a red circle", "a blue star", "a green ring"]
    assert prompts[3:] == [f"image {number}" for number in range(300)]
    assert {record.lane for record in records if record is not None} == {Lane.BULK}
    assert records[2] is not None
    assert records[2].config.num_inference_steps == 100
    assert store.depths() == {"demo.bulk": 303}


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"width": 100}, "width"),
        ({"width": 512, "height": 512}, "width"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"sampler": "magic"}, "sampler"),
        ({"steps": 20}, "steps"),
        ({"prompt": "x" * 5000}, "prompt"),
    ],
)
def test_one_bad_config_queues_nothing_and_is_named(
    client: Client, store: JobStore, bad: dict[str, object], field: str
) -> None:
    """The error names index, field and remedy, and none of the good ones before it was queued."""
    with pytest.raises(InvalidRequest) as caught:
        client.submit_many(["good", {"prompt": "bad", **bad}, "good"])
    assert caught.value.field == f"configs[1].{field}"
    assert caught.value.remedy
    assert store.counts()[JobState.QUEUED] == 0


def test_an_unknown_model_names_those_there_are(client: Client, settings: Settings) -> None:
    """The remedy lists what can be asked for and how to start a worker; with none announced it says just that."""
    with pytest.raises(UnknownModel, match=r"one of: demo; or start a worker .*--model sdxl"):
        client.submit("a red circle", model="sdxl")
    nobody = settings.model_copy(update={"key_prefix": settings.key_prefix + "empty:"})
    with Client(settings=nobody) as empty, pytest.raises(UnknownModel, match="; start a worker"):
        empty.submit("a red circle")


def test_a_model_announced_later_is_found_at_once(client: Client, store: JobStore) -> None:
    """The memory of cards never hides a model that was announced after it was filled."""
    client.submit("a red circle")
    store.announce_model(CARD.model_copy(update={"name": "late"}))
    assert client.submit("a red circle", model="late").status().config.model == "late"


def test_events_tell_each_change_once_and_end(client: Client, store: JobStore, storage: Storage) -> None:
    """The record is yielded when it changes, ends with the final one, and progress never falls."""
    job = client.submit("a red circle")
    seen = []
    for record in job.follow(timeout=120):
        seen.append(record)
        if record.state is JobState.QUEUED:
            worker = in_background(lambda: finish(store, storage, job.id))
    worker.join()
    assert seen[0].state is JobState.QUEUED
    assert seen[-1].state is JobState.SUCCEEDED
    assert len(seen) == len(set(map(repr, seen)))
    shares = [record.progress for record in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_waiting_for_many_returns_them_in_order(client: Client, store: JobStore, storage: Storage) -> None:
    """Whatever order they end in, over more jobs than one look takes in."""
    jobs = client.submit_many([f"image {number}" for number in range(620)])
    ids = [job.id for job in jobs]

    def work() -> None:
        claims = [claim(store, job_id) for job_id in ids]
        for claimed in reversed(claims):
            assert store.commit(claimed, images=[], timings={})

    worker = in_background(work)
    records = client.wait(ids, timeout=120)
    worker.join()
    assert [record.id for record in records] == ids
    assert {record.state for record in records} == {JobState.SUCCEEDED}


def test_a_failed_job_raises_with_its_reason(client: Client, store: JobStore) -> None:
    """wait and images raise JobFailed with the worker's words; check=False returns the record instead."""
    job = client.submit("a red circle")
    store.fail(claim(store, job.id), JobError(code="invalid_request", message="the prompt has 99 tokens"), retry=False)
    with pytest.raises(JobFailed, match="99 tokens"):
        job.wait(timeout=120)
    with pytest.raises(JobFailed, match="99 tokens"):
        client.images(job.id)
    assert client.wait(job.id, 120, check=False).state is JobState.FAILED


def test_a_cancelled_job_raises_and_cancelling_twice_is_harmless(client: Client) -> None:
    """cancel is final at once; waiting for it then says so."""
    job = client.submit("a red circle")
    assert job.cancel() is JobState.CANCELLED
    assert job.cancel() is JobState.CANCELLED
    with pytest.raises(JobCancelled, match=job.id):
        job.wait(timeout=120)


def test_an_unknown_id_is_told_from_a_queued_one(client: Client) -> None:
    """Every verb on an id nobody created raises JobNotFound, also among known ones."""
    known = client.submit("a red circle").id
    for verb in (client.status, client.cancel, client.images, client.urls):
        with pytest.raises(JobNotFound, match="nosuchjob"):
            verb("nosuchjob")
    with pytest.raises(JobNotFound, match="nosuchjob"):
        client.wait([known, "nosuchjob"], timeout=120)


def test_ids_and_handles_one_and_many_do_everywhere(client: Client, store: JobStore, storage: Storage) -> None:
    """One gives one, many give a list; an id is never taken for an iterable of its letters."""
    first, second = client.submit("a red circle"), client.job(client.submit("a blue circle").id)
    for job in (first, second):
        finish(store, storage, job.id)
    assert client.wait(first, 10).id == client.wait(first.id, 10).id == first.id
    manys: list[Any] = [[first, second.id], (first.id, second), {first: 1, second: 2}, (job for job in (first, second))]
    for many in manys:
        assert [record.id for record in client.wait(many, 10)] == [first.id, second.id]
    assert {record.id for record in client.follow([first, second], timeout=10)} == {first.id, second.id}
    assert [record.id for record in client.follow(first, timeout=10)] == [first.id]
    assert client.cancel(first) is JobState.SUCCEEDED
    assert client.cancel([first, second.id]) == [JobState.SUCCEEDED] * 2
    assert [[image.job_id for image in images] for images in client.images([second, first.id])] == [
        [second.id],
        [first.id],
    ]
    assert client.images(first)[0].job_id == first.result()[0].job_id == first.id
    assert client.status(second) == second.status()
    assert client.urls(second)
    assert (client.wait([], 0), client.cancel(()), client.images([])) == ([], [], [])


def test_what_names_no_job_is_refused_before_anything_happens(client: Client) -> None:
    """Another kind's handle, a number, bytes, a record; and a string as a list of configs."""
    job = client.submit("a red circle")
    mistaken: list[tuple[Any, str]] = [
        (client.batch("batch_1"), "BatchHandle"),
        (7, "int"),
        (b"ab", "bytes"),
        ([job, None], "NoneType"),
        (job.status(), "tuple"),
    ]
    for wrong, said in mistaken:
        for call in (client.wait, client.follow, client.cancel, client.images):
            with pytest.raises(InvalidRequest, match=rf"{said} does not name a job; give the id"):
                call(wrong)
    for alone in (client.status, client.urls, client.previews, client.job, client.dead_jobs.drop):
        with pytest.raises(InvalidRequest, match="list does not name a job; give the id of a job or its handle"):
            alone([job.id])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="JobHandle does not name a batch"):
        client.batches.wait(job)  # type: ignore[call-overload]
    for not_many in ("abc", {"prompt": "a"}, GenerationConfig(prompt="a"), 7):
        with pytest.raises(InvalidRequest, match="use `submit` for one job"):
            client.submit_many(not_many)  # type: ignore[arg-type]
    assert client.counts()[JobState.QUEUED] == 1


def test_all_are_cancelled_though_one_is_not_known(client: Client) -> None:
    """Which one is said afterwards."""
    jobs = client.submit_many(["a", "b"])
    with pytest.raises(LookupError, match="nosuchjob"):
        client.cancel([jobs[0], "nosuchjob", jobs[1]])
    assert all(job.done() for job in jobs)


def test_images_of_an_unfinished_job_are_refused(client: Client) -> None:
    """images before the end says to wait, and does not block."""
    job = client.submit("a red circle")
    with pytest.raises(InvalidRequest, match="wait for it"):
        client.images(job.id)


def test_waiting_without_a_worker_says_so(settings: Settings, store: JobStore) -> None:
    """A warning while waiting, once, and the time-out's message name the model and the command that helps."""
    store.announce_model(CARD)
    heard: list[str] = []
    with Client(settings=settings, on_warning=heard.append) as client:
        job = client.submit("a red circle")
        with pytest.raises(WaitTimeout, match=r"no live worker serves 'demo'.*calotype worker --model demo"):
            job.wait(timeout=0.3)
        assert len(heard) == 1
        assert "no live worker serves 'demo'" in heard[0]


def test_waiting_with_a_worker_does_not_blame_it(settings: Settings, store: JobStore) -> None:
    """Where a live worker serves the model, nothing is said about missing ones."""
    store.announce_model(CARD)
    info = WorkerInfo(name="w", model="demo", device="cpu", host="h", pid=1, version="0", started_at=0.0)
    store.announce_worker(info, ttl_seconds=30)
    heard: list[str] = []
    with Client(settings=settings, on_warning=heard.append) as client:
        assert [worker.name for worker in client.workers()] == ["w"]
        job = client.submit("a red circle")
        with pytest.raises(WaitTimeout, match=r"queued.*wait longer"):
            job.wait(timeout=0.2)
    assert heard == []


def test_lists_and_counts(client: Client, store: JobStore) -> None:
    """jobs is newest first and can be narrowed by state; counts agrees."""
    jobs = [client.submit(f"image {number}") for number in range(3)]
    jobs[0].cancel()
    assert {record.id for record in client.jobs()} == {job.id for job in jobs}
    assert [record.id for record in client.jobs(state=JobState.CANCELLED)] == [jobs[0].id]
    assert len(client.jobs(limit=2)) == 2
    counts = client.counts()
    assert (counts[JobState.QUEUED], counts[JobState.CANCELLED]) == (2, 1)
    assert list(client.models()) == ["demo"]


def test_an_unreachable_redis_is_one_clear_error() -> None:
    """The address and the setting are named."""
    with Client("redis://127.0.0.1:1/0") as client, pytest.raises(RedisUnavailable, match="CALOTYPE_REDIS_URL"):
        client.submit("a red circle")


def test_async_client_does_the_same(client: Client, settings: Settings, store: JobStore, storage: Storage) -> None:
    """Submit, follow, wait, fetch and cancel with await; many waits at once hold no thread each."""

    async def scenario() -> None:
        async with AsyncClient(settings=settings) as aio:
            jobs = await aio.submit_many([f"image {number}" for number in range(60)])
            waits = [asyncio.create_task(job.wait(timeout=120)) for job in jobs]
            for job in jobs:
                await asyncio.to_thread(finish, store, storage, job.id)
            records = await asyncio.gather(*waits)
            assert [record.id for record in records] == [job.id for job in jobs]
            [image] = await jobs[0].images()
            assert image.image.size == (128, 128)
            last = await aio.submit("one more")
            assert await last.cancel() is JobState.CANCELLED
            states = [record.state async for record in last.follow(timeout=120)]
            assert states == [JobState.CANCELLED]
            with pytest.raises(JobCancelled, match=last.id):
                await last.wait(timeout=120)

    asyncio.run(scenario())


def test_a_handle_names_its_job(client: Client) -> None:
    """The repr is what one would type again."""
    job = client.submit("a red circle")
    assert isinstance(job, JobHandle)
    assert repr(job) == f"JobHandle('{job.id}')"
    assert (job, hash(job)) == (client.job(job.id), hash(client.job(job.id)))
    assert not job.done()
