"""`calotype.testing`, as users' tests have it: a real queue and storage, and a worker that does what a script says."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from calotype import Client, InvalidRequest, JobCancelled, JobFailed, JobState, Lane
from calotype.embedded import EmbeddedServers
from calotype.testing import JobContext, Sandbox, ScriptedWorker, WorkerCrash, demo_card
from calotype_shared.errors import GenerationFailed
from calotype_shared.queue.job_store import JobStore
from calotype_worker.output.image import read_provenance
from tests.integration.conftest import until
from tests.integration.test_documents import BLOCK, ROOT, as_pattern
from tests.invariants import check_bucket, check_store


@pytest.fixture
def sandbox(servers: EmbeddedServers) -> Iterator[Sandbox]:
    """After the test, keys and objects must agree with the records, as after real workers."""
    with Sandbox(servers=servers) as sandbox:
        yield sandbox
        with Redis.from_url(sandbox.settings.redis_url, decode_responses=True) as redis:
            store = JobStore(redis, key_prefix=sandbox.settings.key_prefix)
            check_store(store, redis)
            check_bucket(store, redis, sandbox.worker._storage)  # type: ignore[arg-type]


def test_images_are_what_was_asked_for(sandbox: Sandbox) -> None:
    """In size, format, number, seeds and provenance; equal for equal configs and different for others."""
    job = sandbox.client.submit("a", seed=7, num_images=2, width=160, height=96, output_format="webp")
    first, second = job.result(60)
    assert [image.ref.seed for image in (first, second)] == [7, 8]
    assert (first.image.size, first.image.format) == ((160, 96), "WEBP")
    assert first.data != second.data
    alone = sandbox.client.submit("a", seed=8, width=160, height=96, output_format="webp").result(60)[0]
    assert alone.image.getpixel((0, 0)) == second.image.getpixel((0, 0))
    said = read_provenance(alone.data)
    assert (said["config"]["prompt"], said["seed"], said["model"]) == ("a", 8, "demo")
    record = job.status()
    assert (record.attempt, record.step, record.worker) == (1, record.total_steps, "scripted-worker")


def test_a_script_decides_how_a_job_ends(sandbox: Sandbox) -> None:
    """An error of ours fails the job with its code; a fault of the worker is tried again, until it is enough."""

    def script(context: JobContext) -> None:
        if context.config.prompt == "bad":
            raise GenerationFailed("the model cannot make it")
        if context.config.prompt == "unlucky" and context.job.attempt < 3:
            raise RuntimeError("out of luck")
        if context.config.prompt == "doomed":
            raise RuntimeError("always")

    sandbox.worker.script = script
    bad, unlucky, doomed, good = [sandbox.client.submit(p) for p in ("bad", "unlucky", "doomed", "good")]
    with pytest.raises(JobFailed, match="the model cannot make it"):
        bad.wait(60)
    record = bad.status()
    assert record.error is not None
    assert (record.error.code, record.failures, record.attempt) == ("generation_failed", 1, 1)
    assert (unlucky.wait(60).attempt, good.wait(60).attempt) == (3, 1)
    with pytest.raises(JobFailed, match="always"):
        doomed.wait(60)
    assert doomed.status().failures == doomed.status().max_failures == 3


def test_progress_is_seen_and_a_cancellation_noticed(sandbox: Sandbox) -> None:
    """A job stands still where its script waits; once cancelled the worker leaves it, and takes the next."""
    go = threading.Event()

    def script(context: JobContext) -> None:
        if context.config.prompt == "long":
            context.progress(context.total_steps // 2)
            context.wait_for(go)
        elif context.config.prompt == "slow":
            context.progress(1)
            context.wait(600)

    sandbox.worker.script = script
    long = sandbox.client.submit("long", num_inference_steps=10)
    until(lambda: long.status().progress == 0.5)
    go.set()
    assert long.wait(60).progress == 1.0
    slow = sandbox.client.submit("slow")
    until(lambda: slow.status().progress > 0)
    assert slow.cancel() is JobState.CANCELLED
    assert sandbox.client.submit("next").wait(60).state is JobState.SUCCEEDED
    with pytest.raises(JobCancelled):
        slow.wait(60)
    assert sandbox.worker.done[1] == slow.id


def test_a_worker_that_stops_hands_its_job_back(servers: EmbeddedServers) -> None:
    """At the next call of the script, and without a failure; another one makes it."""
    with Sandbox(servers=servers) as sandbox:
        sandbox.worker.pause()
        with ScriptedWorker(sandbox.settings, [demo_card()], script=lambda context: context.wait(600), name="leaves"):
            job = sandbox.client.submit("x")
            until(lambda: job.status().state is JobState.RUNNING)
        assert job.status().state is JobState.QUEUED
        sandbox.worker.resume()
        record = job.wait(60)
        assert (record.failures, record.crashes, record.worker) == (0, 0, "scripted-worker")


def test_a_crash_is_what_a_client_sees_of_one(servers: EmbeddedServers) -> None:
    """The lease runs out, the attempt counts as lost with its worker, and another one makes the images."""

    def script(context: JobContext) -> None:
        if context.job.attempt == 1:
            raise WorkerCrash

    with Sandbox(servers=servers, lease_seconds=0.5) as sandbox:
        sandbox.worker.script = script
        record = sandbox.client.submit("x").wait(60)
        assert (record.attempt, record.crashes, record.failures) == (2, 1, 0)
        assert [ended.how for ended in record.history] == ["lost"]


def test_batches_and_lanes(sandbox: Sandbox) -> None:
    """A dispatcher is there too; a paused worker leaves all in the queue."""
    sandbox.worker.pause()
    job = sandbox.client.submit("x", lane=Lane.BULK)
    batch = sandbox.client.batches.submit([{"prompt": f"{n}"} for n in range(3)])
    until(lambda: batch.status().counts.queued == 3)
    assert job.status().state is JobState.QUEUED
    sandbox.worker.resume()
    assert batch.wait(60).counts.succeeded == 3
    assert job.wait(60).state is JobState.SUCCEEDED


def test_models_are_those_of_their_cards(servers: EmbeddedServers) -> None:
    """An ensemble of two is made by both; what a card does not have is refused before it is queued."""
    cards = [demo_card(), demo_card("other", version="2", features=frozenset({"text_to_image"}))]
    with Sandbox(servers=servers, cards=cards, tenant="acme") as sandbox:
        images = sandbox.client.submit("x", ensemble=["other"]).result(60)
        assert [read_provenance(image.data)["model_version"] for image in images] == ["test", "2"]
        assert sandbox.client.submit("x").status().tenant == "acme"
        buffer = io.BytesIO()
        Image.new("RGB", (128, 128)).save(buffer, "PNG")
        with pytest.raises(InvalidRequest, match="image_to_image"):
            sandbox.client.submit("x", model="other", init_image=buffer.getvalue())
        with pytest.raises(InvalidRequest, match="output_formats"):
            ScriptedWorker(sandbox.settings, [demo_card(output_formats=("mp4",))])


def test_a_sandbox_has_servers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any given, and its variables lead a client there that knows nothing of it."""
    with Sandbox() as sandbox:
        for name, value in sandbox.environment.items():
            monkeypatch.setenv(name, value)
        with Client() as client:
            assert client.submit("x").wait(60).state is JobState.SUCCEEDED
    with pytest.raises(RedisConnectionError):
        Redis.from_url(sandbox.settings.redis_url).ping()


@pytest.mark.slow
def test_the_how_to_runs(tmp_path: Path) -> None:
    """Pasted into an empty folder by a user who has no server anywhere."""
    system = {name: value for name, value in os.environ.items() if not name.startswith("CALOTYPE_")}
    environment = {**system, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    text = (ROOT / "docs/how-to/test-your-producer.md").read_text()
    blocks = BLOCK.findall(text)
    assert len(blocks) > 3
    for kind, code, printed in blocks:
        command = ["bash", "-euo", "pipefail", "-c", code] if kind == "sh" else [sys.executable, "-c", code]
        ran = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, f"{code}\n{ran.stdout}"
        if printed:
            assert re.fullmatch(as_pattern(printed), ran.stdout), f"{code}\nprints\n{ran.stdout}\nthe page:\n{printed}"
