"""Pipeline models in the whole service: jobs through the queue, a worker process, and what the client gets."""

from __future__ import annotations

import io
import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from calotype import Client
from calotype_worker.output.audio import read_audio
from calotype_worker.output.mesh import read_provenance
from calotype_worker.output.video import encode_mp4, read_mp4
from tests.faults.harness import Forge, WorkerProcess
from tests.integration.conftest import Command
from tests.unit.pipelines.builders import flux2, modular, sound_and_mesh, video
from tests.video_and_mesh_models import write_tiny_shap_e


def write(pipeline: Any, folder: Path, *, side: int | None = None) -> Path:
    """Save a pipeline as a worker is given it; `side`: its native width and height in pixels."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    if side is not None:
        (folder / "calotype.json").write_text(json.dumps({"native_sizes": [[side, side]]}))
    return folder


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path, forge: Forge) -> Iterator[Callable[..., WorkerProcess]]:
    """Starts a worker with these models."""
    workers: list[WorkerProcess] = []

    def begin(*arguments: str, **models: Path) -> WorkerProcess:
        named = [part for name, folder in models.items() for part in ("--model", f"{name}={folder}")]
        log = tmp_path / f"worker-{len(workers)}.log"
        workers.append(forge.start([*named, *arguments], environment=environment, log=log))
        workers[-1].wait_for("worker ready", 180)
        return workers[-1]

    yield begin
    for worker in workers:
        worker.kill()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_images_edits_and_sound(
    start: Callable[..., WorkerProcess], client: Client, calotype: Command, tmp_path: Path
) -> None:
    """One model makes images and edits of reference images, another one sound; as plain diffusers does by itself.

    Card, command line and metrics say which of their network calls are merged.
    """
    klein, sound = flux2.flux2_klein(), sound_and_mesh.stable_audio()
    worker = start(
        "--metrics-port", "0", klein=write(klein, tmp_path / "klein", side=64), sound=write(sound, tmp_path / "sound")
    )
    reference = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    common = {"model": "klein", "num_inference_steps": 3, "guidance_scale": 4.0}
    image = client.submit(common, prompt="a fox", seed=1)
    edit = client.submit(common, prompt="the same in red", seed=2, images=[reference])
    tone = {"model": "sound", "prompt": "rain", "num_inference_steps": 3, "guidance_scale": 3.0, "audio_seconds": 0.3}
    sounds = [client.submit(tone, seed=seed, output_format=kind) for seed, kind in ((3, "wav"), (3, "flac"))]

    for job, prompt, seed, more in ((image, "a fox", 1, {}), (edit, "the same in red", 2, {"image": reference})):
        expected = klein(
            prompt=prompt,
            height=64,
            width=64,
            num_inference_steps=3,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **more,
        ).images[0]
        [made] = job.result(timeout=180)
        assert np.abs(pixels(made.data) - (expected * 255).round()).max() <= 1
    (wav, said), (flac, _) = (read_audio(job.result(timeout=180)[0].data) for job in sounds)
    expected = sound(
        prompt="rain",
        num_inference_steps=3,
        guidance_scale=3.0,
        audio_end_in_s=0.3,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).audios[0]
    assert (wav.rate, wav.samples.shape) == (256, tuple(expected.shape))
    assert np.array_equal(wav.samples, flac.samples)
    assert np.abs(wav.samples - expected.float().numpy().clip(-1, 1)).max() <= 2 / 32768
    assert np.abs(wav.samples).max() > 0.01
    assert (said["model"], said["seed"]) == ("sound", 3)

    networks = {network.network: network for network in client.models()["klein"].networks}
    assert {"text_encoder", "transformer", "vae"} == set(networks)
    assert networks["transformer"].merged
    shown = calotype("models", "--verbose").stdout
    assert re.search(r"klein +transformer +merged", shown), shown
    assert "transformer" not in calotype("models").stdout
    found = re.search(r"metrics_port\W+(\d+)", worker.text())
    assert found is not None
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/metrics", timeout=30).read().decode()
    counted = re.search(
        r'merge_patterns_total\{model="klein",network="transformer",outcome="verified"\} (\d+)', metrics
    )
    assert counted is not None, metrics
    assert int(counted[1]) >= 1


@pytest.mark.slow
def test_videos_meshes_and_blocks(start: Callable[..., WorkerProcess], client: Client, tmp_path: Path) -> None:
    """An MP4 has a picture and a sound stream, a mesh has faces, and a modular pipeline makes images."""
    shape = write_tiny_shap_e(tmp_path / "shape")
    (shape / "calotype.json").write_text(json.dumps({"native_sizes": [[32, 32]]}))
    ltx = video.ltx2()
    blocks = modular.modular_flux()
    (tmp_path / "blocks").mkdir()
    blocks.save_pretrained(str(tmp_path / "blocks"), overwrite_modular_index=True)
    (tmp_path / "blocks" / "calotype.json").write_text(json.dumps({"native_sizes": [[64, 64]]}))
    start(clip=write(ltx, tmp_path / "clip", side=32), shape=shape, blocks=tmp_path / "blocks")
    asked = {"model": "clip", "num_inference_steps": 2, "num_frames": 9, "fps": 24.0, "output_format": "mp4"}
    clip = client.submit(asked, prompt="waves", seed=5, parameters={"max_sequence_length": 16})
    mesh = client.submit(
        {"prompt": "a cup", "model": "shape", "seed": 6, "output_format": "ply"}, num_inference_steps=2
    )

    image = client.submit({"prompt": "a hill", "model": "blocks", "seed": 7}, num_inference_steps=2)

    expected = ltx(
        prompt="waves",
        height=32,
        width=32,
        num_frames=9,
        frame_rate=24.0,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    )
    [made] = clip.result(timeout=180)
    moving = read_mp4(made.data)
    assert moving.frames.shape == (9, 32, 32, 3)
    frames = (np.asarray(expected.frames[0]) * 255).round().astype(np.uint8)
    lossy = read_mp4(encode_mp4(frames, 24.0, {})).frames  # H.264 keeps few of the colors of noise
    assert np.abs(moving.frames.astype(int) - lossy.astype(int)).mean() < 3
    assert np.abs(moving.frames.astype(int) - moving.frames[::-1].astype(int)).mean() > 10
    assert (moving.provenance["seed"], made.ref.content_type) == (5, "video/mp4")
    sound, _ = read_audio(made.data)
    assert sound.rate == 16_000
    assert sound.samples.shape[0] == 2
    with av.open(io.BytesIO(made.data)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
    data = mesh.result(timeout=180)[0].data
    assert read_provenance(data)["model"] == "shape"
    [faces] = [int(line.split()[-1]) for line in data.split(b"\n") if line.startswith(b"element face")]
    assert faces > 100
    expected = blocks(
        prompt="a hill",
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        output="images",
    )[0]
    assert np.abs(pixels(image.result(timeout=180)[0].data) - (expected * 255).round()).max() <= 1
