"""What a config may ask for, through the queue: real Valkey, real S3, a real worker with two models and adapters.

Each image is compared with the in-process one of the same config, which golden tests hold against plain diffusers.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from calotype import Client, InvalidRequest, JobImage, JobState
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.storage.images import MAX_PIXELS, upload_key
from calotype_shared.storage.s3 import Storage
from tests.faults.harness import WorkerProcess
from tests.integration.conftest import until
from tests.models import sample_image, write_tiny_controlnet, write_tiny_embedding, write_tiny_lora, write_tiny_sd

SOURCE = Image.fromarray(sample_image(1))
MASK = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))


@dataclass(frozen=True)
class Service:
    client: Client
    folder: Path
    worker: WorkerProcess


@pytest.fixture
def service(start_worker: Callable[..., WorkerProcess], client: Client, tiny_model: Path, tmp_path: Path) -> Service:
    """A worker with the models tiny and other, two LoRAs, a ControlNet and a textual inversion on tiny."""
    write_tiny_sd(tmp_path / "other", seed=9)
    for index, name in enumerate(("first", "second")):
        write_tiny_lora(tmp_path / f"{name}.safetensors", seed=11 + index, text=bool(index))
    write_tiny_controlnet(tmp_path / "outline", seed=21)
    write_tiny_embedding(tmp_path / "ring.safetensors", "<ring>", seed=31)
    worker = start_worker(
        *("--model", f"other={tmp_path / 'other'}"),
        *("--lora", f"first={tmp_path / 'first.safetensors'}", "--lora", f"second={tmp_path / 'second.safetensors'}"),
        *("--control", f"outline={tmp_path / 'outline'}", "--embedding", f"<ring>={tmp_path / 'ring.safetensors'}"),
    )
    return Service(client=client, folder=tmp_path, worker=worker)


def pixels(made: JobImage) -> np.ndarray:
    return np.asarray(made.image.convert("RGB")).astype(int)


BASE = {"model": "tiny", "seed": 5, "num_inference_steps": 8, "guidance_scale": 3.0, "prompt": "a ring"}
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "image-to-image": {"init_image": SOURCE, "strength": 0.6},
    "strength 0": {"init_image": SOURCE, "strength": 0.0},
    "strength 1": {"init_image": SOURCE, "strength": 1.0},
    "inpainting": {"init_image": SOURCE, "mask_image": MASK},
    "lora": {"loras": [{"name": "first"}]},
    "two loras": {"loras": [{"name": "first", "weight": 0.5}, {"name": "second", "weight": -0.4}]},
    "control": {"controls": [{"name": "outline", "image": SOURCE, "scale": 0.8, "end": 0.7}]},
    "weights": {"prompt": "a (ring:1.6)"},
    "token": {"prompt": "a <ring>"},
    "long": {"prompt": "a ring, " * 12},
    "refiner": {"refiner": {"model": "other", "start": 0.5}},
    "video size": {"width": 96, "height": 64},
}


def test_every_feature_goes_through_the_queue(service: Service, storage: Storage) -> None:
    """One batch of everything; each does something, and provenance makes the same image again."""
    client = service.client
    with service.worker.stopped():  # so that they meet, however long this takes
        jobs = {name: client.submit({**BASE, **asked}) for name, asked in ASKED.items()}
        pair = client.submit({**BASE, "ensemble": ["other"], "num_images": 2})
    made = {name: pixels(job.result(timeout=120)[0]) for name, job in jobs.items()}
    plain = made["plain"]
    for name in set(ASKED) - {"plain", "strength 1", "video size"}:
        assert np.abs(made[name] - plain).max() > 3, f"{name} did nothing"
    assert np.array_equal(made["strength 0"], sample_image(1)), "strength 0 gives the source back"
    assert np.abs(made["strength 1"] - plain).max() <= 1, "strength 1 ignores it"
    assert made["video size"].shape == (64, 96, 3)
    painted = np.asarray(MASK) > 0
    assert np.array_equal(made["inpainting"][~painted], sample_image(1)[~painted]), "kept pixels are kept"
    assert np.abs(made["inpainting"] - sample_image(1))[painted].max() > 12

    images = pair.result(timeout=120)
    assert [p.ref.seed for p in images] == [5, 6, 5, 6]
    assert np.abs(pixels(images[0]) - plain).max() <= 1
    assert np.abs(pixels(images[2]) - plain).max() > 12, "the second model made the second pair"

    again = GenerationConfig.parse(images[3].image.info["calotype"] and _config_of(images[3]))
    assert (again.model, again.ensemble, again.seed) == ("other", (), 6)
    assert np.abs(pixels(client.submit(again).result(timeout=120)[0]) - pixels(images[3])).max() <= 1
    repeat = _config_of(jobs["two loras"].images()[0])
    assert np.abs(pixels(client.submit(repeat).result(timeout=120)[0]) - made["two loras"]).max() <= 1

    [worker] = client.workers()
    assert worker.models == ("other", "tiny")
    assert worker.mean_rows > 2, "the jobs did not share forward passes"
    previews(service)


def _config_of(made: JobImage) -> dict[str, Any]:
    import json

    image = made.image
    assert isinstance(image, PngImagePlugin.PngImageFile)
    config: dict[str, Any] = json.loads(image.text["calotype"])["config"]
    return config


def previews(service: Service) -> None:
    """A running job shows where it is heading, on its way."""
    job = service.client.submit({**BASE, "num_inference_steps": 400, "sampler": "ddim", "preview_every": 20})
    steps = []
    for preview in job.follow_previews(timeout=120):
        steps.append(preview.step)
        with Image.open(io.BytesIO(preview.data)) as shown:
            assert shown.format == "JPEG"
            assert shown.size == (128, 128)
            assert np.asarray(shown).std() > 1, "a preview of one color shows nothing"
    assert steps == sorted(set(steps))
    assert len(steps) >= 2
    assert all(step % 20 == 0 and step < 400 for step in steps)
    assert job.status().state is JobState.SUCCEEDED


def test_what_cannot_be_done_is_refused_at_submission(
    start_worker: Callable[..., WorkerProcess], client: Client, storage: Storage
) -> None:
    """With the field and the reason; nothing is queued and nothing stored."""
    start_worker()
    buffer = io.BytesIO()
    SOURCE.save(buffer, "BMP")
    wide = Image.new("1", (MAX_PIXELS // 4 + 8, 4))
    packed = io.BytesIO()
    wide.save(packed, "PNG")
    moving = io.BytesIO()
    SOURCE.save(moving, "WEBP", save_all=True, append_images=[Image.fromarray(sample_image(2))])
    refused: dict[str, dict[str, Any]] = {
        r"init_image.*not a readable image.*PNG": {"init_image": b"not an image"},
        r"init_image.*not a readable image.*JPEG": {"init_image": buffer.getvalue()},
        r"init_image.*more than 25000000 pixels": {"init_image": packed.getvalue()},
        r"init_image.*animated": {"init_image": moving.getvalue()},
        r"upload=.*does not exist": {"init_image": "a" * 64},
        r"mask_image=.*needs a source image": {"mask_image": SOURCE},
        r"strength=0.5: .*needs a source image": {"strength": 0.5},
        r"controlnet.*does not support this": {"controls": [{"name": "outline", "image": SOURCE}]},
        r"lora.*does not support this": {"loras": [{"name": "absent"}]},
        r"no worker has announced": {"ensemble": ["absent"]},
        r"num_frames=.*does not support this": {"num_frames": 8},
        r"output_format=.*available: png": {"output_format": "mp4"},
        r"prompt=.*weight 50": {"prompt": "a (ring:50)"},
        r"controls.0.scale=-1: .*at least 0": {"controls": [{"name": "outline", "image": "a" * 64, "scale": -1}]},
        r"loras=.*twice": {"loras": [{"name": "a"}, {"name": "a"}]},
    }
    for said, asked in refused.items():
        with pytest.raises(InvalidRequest, match=said):
            client.submit(dict(BASE, **asked))
    assert sum(client.counts().values()) == 0
    assert len(list(storage.list("uploads/"))) == 1, "only the good image was stored"


def test_a_tampered_upload_fails_its_job_and_no_other(
    start_worker: Callable[..., WorkerProcess], client: Client, storage: Storage
) -> None:
    """What is stored is checked again by the worker: others may write to the bucket."""
    upload = client.upload(SOURCE)
    until(lambda: storage.exists(upload_key(upload)))
    storage.put(upload_key(upload), b"something else", "image/png")
    start_worker()
    bad = client.submit({**BASE, "init_image": upload})
    good = client.submit(BASE)
    assert good.wait(120).state is JobState.SUCCEEDED
    [record] = client.wait([bad.id], timeout=120, check=False)
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert "the stored file was changed" in record.error.message
    assert record.failures == 1, "the job itself was to blame: no retry"
