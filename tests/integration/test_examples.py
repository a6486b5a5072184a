"""Runs the examples as a reader would, against a real worker on the bundled model, and looks at their images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calotype import Client, InvalidRequest
from calotype_worker.output.mesh import read_provenance
from calotype_worker.output.video import read_gif, read_mp4
from tests.integration.conftest import CommandWorker
from tests.video_and_mesh_models import write_tiny_animatediff, write_tiny_shap_e

pytestmark = pytest.mark.slow

TOGETHER = 4  # their images share steps
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Starts a worker with these models, then runs examples in a folder of their own; no models, no worker."""
    workers = []

    def start(models: list[str], examples: list[str]) -> None:
        if models:
            arguments = [part for model in models for part in ("--model", model)]
            worker = CommandWorker(arguments, environment, tmp_path / "worker.log")
            workers.append(worker)
            worker.wait_until_ready(90)
        (tmp_path / "out").mkdir(exist_ok=True)
        with ThreadPoolExecutor(TOGETHER) as pool:
            for name, ran in zip(examples, pool.map(example, examples), strict=True):
                assert ran.returncode == 0, f"{name}: {ran.stderr[-2000:]}"
                assert "out/" in ran.stdout

    def example(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / f"{name}.py")]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )

    yield start
    for worker in workers:
        worker.stop()


def test_the_examples_show_what_they_say(run: Callable[..., None], tmp_path: Path) -> None:
    """Every image example, and of each the thing it is there for."""
    names = [
        *("text_to_image", "presets", "image_to_image", "inpainting", "prompt_weights", "lora"),
        *("textual_inversion", "controlnet", "previews", "ensemble", "refiner", "in_process"),
    ]
    run([], ["second_model"])
    run(["demo", f"other={tmp_path / 'out' / 'other'}"], names)

    def sample_image(name: str, index: int) -> np.ndarray:
        with Image.open(tmp_path / "out" / f"{name}-{index}.png") as shown:
            return np.asarray(shown.convert("RGB")).astype(int)

    def color(name: str, index: int, where: tuple[slice, slice] = np.s_[56:72, 56:72]) -> str:
        """The nearest plain color of a patch, by default the middle."""
        known = {
            "red": (222, 36, 36),
            "green": (40, 160, 70),
            "blue": (45, 80, 215),
            "yellow": (250, 215, 50),
            "white": (245, 245, 245),
            "black": (20, 20, 20),
            "pink": (245, 140, 185),
            "purple": (130, 55, 170),
        }
        mean = sample_image(name, index)[where].reshape(-1, 3).mean(0)
        return min(known, key=lambda name: float(np.abs(mean - known[name]).sum()))

    def white(name: str, index: int) -> float:
        """The share of nearly white pixels."""
        return float((sample_image(name, index).min(-1) > 200).mean())

    corner = np.s_[4:20, 108:124]
    assert [color("text_to_image", i) for i in range(3)] == ["red", "yellow", "green"]
    assert [color("text_to_image", i, corner) for i in range(4)] == ["blue", "purple", "pink", "black"]
    assert np.array_equal(sample_image("image_to_image", 0), sample_image("image_to_image", 1)), "strength 0"
    distances = [
        np.abs(sample_image("image_to_image", 0) - sample_image("image_to_image", i)).mean() for i in (2, 3, 4, 5)
    ]
    assert 0 < distances[0] < distances[-1], "more strength leaves less of the source"
    assert color("image_to_image", 5) == "yellow"
    assert np.array_equal(sample_image("inpainting", 0)[:40], sample_image("inpainting", 2)[:40]), "kept"
    assert (sample_image("inpainting", 3)[40:, 40:, 2] < 120).mean() > 0.1, "a yellow part was painted"
    weighted = [sample_image("prompt_weights", i)[48:80, 48:80].reshape(-1, 3).mean(0) for i in range(2)]
    assert weighted[1][0] - weighted[1][2] > weighted[0][0] - weighted[0][2], "the red counts for more"
    assert [color("prompt_weights", i) for i in (4, 5)] == ["red", "red"], "escapes and two windows are read"
    assert color("prompt_weights", 5, corner) == "blue"
    assert [color("lora", i, corner) for i in (0, 1, 3, 5)] == ["blue", "blue", "black", "black"], "neon is dark"
    assert white("lora", 1) > white("lora", 0) + 0.02, "a sticker has a rim, and each row its own LoRA"
    lime = [sample_image("textual_inversion", i)[56:72, 56:72].reshape(-1, 3).mean(0) for i in (0, 1)]
    assert lime[1][0] > lime[0][0] + 20, "lime is lighter than green"
    inside = np.s_[88:98, 34:100]  # along the base of the drawn triangle
    assert color("controlnet", 1, inside) == "purple"
    assert color("controlnet", 2, inside) == "yellow", "it follows the outline"
    assert color("previews", 2) == "yellow"
    assert [color("ensemble", i) for i in range(4)] == ["red"] * 4
    assert min(white("ensemble", i) for i in (2, 3)) > 0.02 > max(white("ensemble", i) for i in (0, 1)), "two models"
    assert not np.array_equal(sample_image("ensemble", 0), sample_image("ensemble", 1)), "two seeds"
    changes = [np.abs(sample_image("refiner", 0) - sample_image("refiner", i)).mean() for i in (1, 2, 3)]
    assert 0 < changes[0] < changes[1] < changes[2], "the earlier it takes over, the more is the refiner's"
    assert np.array_equal(sample_image("in_process", 3).shape, (128, 128, 3))
    assert [color("in_process", i) for i in (0, 3)] == ["red", "green"]
    assert len(list((tmp_path / "out").glob("previews-*.png"))) >= 3, "a preview, the image and the quick one"


def test_videos_and_meshes_come_out_of_the_same_queue(run: Callable[..., None], client: Client, tmp_path: Path) -> None:
    """Pipelines that run as a whole, each in the formats of its kind; on tiny models, so what is shown is noise."""
    clip, shape = write_tiny_animatediff(tmp_path / "clip"), write_tiny_shap_e(tmp_path / "shape")
    (shape / "calotype.json").write_text(json.dumps({"native_sizes": [[32, 32]]}))  # 10 s of rays; 64x64 takes 50 s
    run([f"clip={clip}", f"shape={shape}"], ["video", "shape3d"])
    out = tmp_path / "out"
    video = read_mp4((out / "video.mp4").read_bytes())
    assert len(video.frames) == 8
    assert (video.provenance["seed"], video.provenance["model"]) == (1, "clip")
    mesh = (out / "shape.ply").read_bytes()
    assert mesh.startswith(b"ply")
    assert read_provenance(mesh)["config"]["model"] == "shape"
    with Image.open(out / "shape.gif") as turntable:
        assert getattr(turntable, "n_frames", 1) > 4

    asked = {"prompt": "a ring", "model": "clip", "num_inference_steps": 3, "num_frames": 6, "guidance_scale": 2}
    [moving] = client.submit({**asked, "output_format": "gif"}).result(timeout=120)
    assert (moving.ref.content_type, len(read_gif(moving.data).frames)) == ("image/gif", 6)
    with pytest.raises(InvalidRequest, match=r"init_image=.*does not support this"):
        client.submit(asked, init_image=Image.new("RGB", (64, 64)))
