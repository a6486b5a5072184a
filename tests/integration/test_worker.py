"""The whole path with real parts: Valkey, S3, worker processes, images."""

from __future__ import annotations

import io
import json
import re
import signal
import urllib.request
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from calotype import Client, GenerationConfig
from calotype_shared.errors import InvalidRequest, JobFailed
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.message import message
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage
from calotype_worker.output.image import read_provenance
from tests.faults.harness import WorkerProcess
from tests.integration.conftest import until

pytestmark = pytest.mark.usefixtures("invariants")

SAMPLERS = ["ddim", "euler_a", "unipc", "dpmpp_2m_karras", "ddpm", "heun"]


def mixed(count: int, steps: int = 6) -> list[GenerationConfig]:
    return [
        GenerationConfig(
            prompt=f"cat {i}",
            model="tiny",
            seed=i,
            num_inference_steps=steps + i % 5,
            sampler=SAMPLERS[i % len(SAMPLERS)],
            guidance_scale=(1.0, 7.5)[i % 2],
        )
        for i in range(count)
    ]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_jobs_become_images_with_their_provenance(
    start_worker: Callable[..., WorkerProcess], client: Client, storage: Storage, store: JobStore, redis: Redis
) -> None:
    """One worker, a mixed batch, and everything a user can ask of it afterwards."""
    worker = start_worker()
    with worker.stopped():  # so that they meet, however long this takes
        jobs = client.submit_many(mixed(12))
    records = client.wait([job.id for job in jobs], timeout=120)
    assert {record.state for record in records} == {JobState.SUCCEEDED}
    assert {record.attempt for record in records} == {1}
    assert all(record.step == record.total_steps for record in records)
    report = client.workers()[0]
    until(lambda: client.workers()[0].images == 12)
    report = client.workers()[0]
    assert report.mean_rows > 2, "jobs did not share forward passes"

    # The file tells how to make it again, and so does the JSON beside it.
    image = jobs[1].images()[0]
    said = read_provenance(image.data)
    assert said["config"] == json.loads(records[1].config.canonical_json())
    assert (said["seed"], said["model"], said["job_id"]) == (1, "tiny", jobs[1].id)
    assert image.image.info["parameters"].startswith("cat 1\nSteps: 7, Sampler: Euler a, CFG scale: 7.5, Seed: 1")
    key = records[1].images[0].key
    assert re.fullmatch(rf"{jobs[1].id}/1-[0-9a-f]{{8}}/0\.png", key)
    assert json.loads(storage.get(key.replace(".png", ".json")))["digest"] == said["digest"]
    assert storage.content_type(key) == "image/png"
    with urllib.request.urlopen(jobs[1].urls()[0]) as answer:
        assert answer.read() == image.data

    # The same config gives the same image, whatever stood beside it.
    again = client.submit(GenerationConfig.parse(said["config"]))
    assert np.abs(pixels(again.result(timeout=120)[0].data) - pixels(image.data)).max() <= 1

    # Several images a job: number i is what seed + i gives alone.
    several = client.submit("cat", model="tiny", seed=5, num_images=3, num_inference_steps=4)
    alone = client.submit("cat", model="tiny", seed=7, num_inference_steps=4)
    made = several.result(timeout=120)
    assert [read_provenance(p.data)["seed"] for p in made] == [5, 6, 7]
    assert np.abs(pixels(made[2].data) - pixels(alone.result(timeout=120)[0].data)).max() <= 1
    assert np.abs(pixels(made[1].data) - pixels(made[2].data)).mean() > 12

    # The other formats carry their provenance too.
    for output_format in ("webp", "jpeg"):
        other = client.submit("cat", model="tiny", seed=5, num_inference_steps=2, output_format=output_format)
        [image] = other.result(timeout=120)
        assert image.ref.content_type == f"image/{output_format}"
        assert read_provenance(image.data)["seed"] == 5
        assert image.image.format == output_format.upper()

    # A drawn seed is stored.
    assert client.submit("cat", model="tiny", num_inference_steps=2).wait(120).config.seed is not None

    # A job that cannot be done fails alone, with the field, the value and the remedy.
    bad = client.submit("x" * 600, model="tiny")
    good = client.submit_many(mixed(4))
    with pytest.raises(JobFailed, match=r"invalid_request: prompt=.*28 windows of 24 tokens; shorten it to 8 windows"):
        bad.wait(120)
    assert all(job.wait(120).state is JobState.SUCCEEDED for job in good)
    with pytest.raises(InvalidRequest, match="width=60"):
        client.submit("cat", model="tiny", width=60)
    with pytest.raises(InvalidRequest, match="use a smaller size"):
        client.submit("cat", model="tiny", width=512, height=512)

    # Duplicate and senseless messages are dropped; the worker lives on.
    queue = store.keys.messages("tiny.bulk")
    before = client.counts()
    strange = json.loads(message("x", "tiny.bulk"))
    strange["body"] = json.dumps([["a", "b", {"c": 1}], {"d": 2}, {}])
    unknown_task = json.loads(message("x", "tiny.bulk"))
    unknown_task["headers"]["task"] = "os.system"
    messages = [message("a", "tiny.bulk"), message("b", "other.bulk"), strange, unknown_task]
    redis.lpush(queue, *(m if isinstance(m, str) else json.dumps(m) for m in messages))
    assert client.submit("after", model="tiny", num_inference_steps=2, lane=Lane.BULK).wait(120)
    assert client.counts()[JobState.SUCCEEDED] == before[JobState.SUCCEEDED] + 1
    assert client.status(jobs[0].id).attempt == 1
    assert worker.alive
    assert "cat 1" not in worker.text(), "prompts do not belong in logs"


def test_cancel_frees_a_running_job_and_a_queued_one(
    start_worker: Callable[..., WorkerProcess], client: Client
) -> None:
    """Its steps stop at once, and a waiting job gets its place."""
    start_worker("--concurrency", "1")
    long = client.submit("long", model="tiny", num_inference_steps=900, sampler="ddim", lane=Lane.BULK)
    queued = client.submit("queued", model="tiny", lane=Lane.BULK)
    last = client.submit("last", model="tiny", num_inference_steps=2, lane=Lane.BULK)
    until(lambda: long.status().step > 0)
    assert queued.cancel() is JobState.CANCELLED
    assert long.cancel() is JobState.CANCELLED
    assert last.wait(120).state is JobState.SUCCEEDED
    assert long.status().step < 900
    assert client.workers()[0].images <= 1
    assert queued.status().attempt == 0


def test_interactive_jobs_go_first(start_worker: Callable[..., WorkerProcess], client: Client) -> None:
    """An interactive job submitted behind a bulk backlog starts before the rest of it."""
    start_worker("--concurrency", "2")
    backlog = client.submit_many(mixed(20, steps=20))
    until(lambda: backlog[0].status().state is not JobState.QUEUED)
    interactive = client.submit("now", model="tiny", num_inference_steps=2, lane=Lane.INTERACTIVE)
    interactive.wait(120)
    assert backlog[-1].status().state is JobState.QUEUED
    client.wait([job.id for job in backlog], timeout=120)
    started = sorted(r.started_at or 0 for r in (job.status() for job in backlog))
    assert sum(t < (interactive.status().started_at or 0) for t in started) < 10


def test_a_redis_that_has_lost_everything_knows_the_models_again(
    start_worker: Callable[..., WorkerProcess], client: Client, redis: Redis, settings: Settings
) -> None:
    """Without a restart of the workers: in seconds, as docs/how-to/back-up.md says."""
    start_worker()
    for key in redis.scan_iter(f"{settings.key_prefix}*"):
        redis.delete(key)
    until(lambda: "tiny" in client.models())
    assert client.submit(mixed(1)[0]).result(120)


def test_two_workers_share_a_queue(start_worker: Callable[..., WorkerProcess], client: Client) -> None:
    """Both do some of it, and every job is done once."""
    for worker in [start_worker("--concurrency", "3", ready=False) for _ in range(2)]:
        worker.wait_for("worker ready")
    records = client.wait([job.id for job in client.submit_many(mixed(24, steps=15))], timeout=120)
    assert [record.history for record in records if record.attempt != 1] == []
    by_worker = Counter(record.worker for record in records)
    assert len(by_worker) == 2
    assert min(by_worker.values()) >= 3


def test_sigterm_finishes_or_returns_what_is_in_flight(
    start_worker: Callable[..., WorkerProcess], client: Client
) -> None:
    """Short jobs finish within the grace period, long ones go back at once; a second worker takes them over."""
    first = start_worker("--concurrency", "4", "--grace-seconds", "5")
    long = [client.submit("long", model="tiny", num_inference_steps=900, seed=i, sampler="ddim") for i in range(2)]
    until(lambda: all(job.status().step > 0 for job in long))
    short = client.submit_many(mixed(2, steps=20))
    until(lambda: all(job.status().step > 0 or job.status().state.final for job in short))
    first.send(signal.SIGTERM)
    assert first.wait(120) == 0, first.text()
    assert [job.status().state for job in short] == [JobState.SUCCEEDED] * 2
    assert [(job.status().state, job.status().failures) for job in long] == [(JobState.QUEUED, 0)] * 2
    assert client.workers() == []
    start_worker()
    until(lambda: all(job.status().step > 0 for job in long))  # no step of the first attempt is left over
    assert all(job.status().attempt == 2 for job in long)
    for job in long:
        job.cancel()


def test_a_second_signal_does_not_wait_for_the_grace_period(
    start_worker: Callable[..., WorkerProcess], client: Client
) -> None:
    """And still hands its job back, so that nobody waits for the lease to run out."""
    worker = start_worker("--grace-seconds", "600")
    job = client.submit("long", model="tiny", num_inference_steps=900, sampler="ddim")
    until(lambda: job.status().step > 0)
    worker.send(signal.SIGTERM)
    until(lambda: "worker drains" in worker.text())
    worker.send(signal.SIGTERM)
    assert worker.wait(120) == 75
    assert job.status().state is JobState.QUEUED
    job.cancel()


def test_an_interactive_job_does_not_wait_for_a_bulk_load(
    start_worker: Callable[..., WorkerProcess], client: Client
) -> None:
    """It is claimed at once and takes the next place in the step batch, though every place for bulk jobs is taken."""
    start_worker("--max-rows", "4")
    first = [20, 600, 700, 800]  # one ends soon; the next long after the claim, and those after it one by one
    bulk = client.submit_many(
        [
            {"prompt": f"bulk {i}", "model": "tiny", "num_inference_steps": steps, "sampler": "ddim"}
            for i, steps in enumerate([*first, *[900] * 40])
        ]
    )
    until(lambda: bulk[0].status().state.final)
    interactive = client.submit("now", model="tiny", num_inference_steps=5, sampler="ddim")
    record = interactive.wait(120)
    assert record.started_at is not None
    began = record.started_at + sum(record.timings[phase] for phase in ("fetch", "prepare", "wait"))
    finished = [at for job in bulk if (at := job.status().finished_at) is not None and at > record.created_at]
    assert not [at for at in finished if at <= record.started_at], "it waited for a thread"
    assert len([at for at in finished if at <= began]) <= 1, "it waited for more than one place"
    assert len(bulk) - len(finished) > 30, "there was a full bulk load"
    for job in bulk:
        job.cancel()
