"""The model family of docs/how-to/model-adapter.md, run through the real engine."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine, EngineSettings, Generated, GenerationRequest
from calotype_worker.models.base import StepModel

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """examples/model_adapter.py, imported as its own directory's scripts are."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("model_adapter_example", EXAMPLES / "model_adapter.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))


def asked(name: str, **fields: object) -> GenerationRequest:
    values: dict[str, object] = {"width": 64, "height": 64, "num_inference_steps": 12, "guidance_scale": 1.0, "seed": 3}
    values |= {"sampler": SamplerType.DDIM, "prompt": f"a {name} wall", "request_id": name}
    return GenerationRequest(**{**values, **fields})  # type: ignore[arg-type]


def made(model: Any, requests: list[GenerationRequest]) -> tuple[list[Generated], Engine]:
    """Their images. Nothing is denoised before all are there: this network is faster than `submit`."""
    there, predict = threading.Event(), model.predict
    model.predict = lambda rows: predict(rows) if there.wait(120) else None
    engine = Engine(model, EngineSettings(max_rows=8))
    engine.start()
    try:
        futures: list[Future[Generated]] = [engine.submit(request) for request in requests]
        there.set()
        return [future.result(120) for future in futures], engine
    finally:
        engine.stop()


def test_rows_of_any_kind_share_its_batch_and_get_what_they_asked_for(example: ModuleType) -> None:
    """Three samplers, guidance on and off, other steps and sizes: each color is the prompt's to within 2 of 255."""
    model = example.PlainColors()
    assert isinstance(model, StepModel)
    requests = [
        asked("red"),
        asked("green", sampler=SamplerType.EULER, num_inference_steps=20),
        asked("blue", sampler=SamplerType.DPMPP_2M, num_inference_steps=9),
        asked("yellow", guidance_scale=1.2, negative_prompt="yellow", num_inference_steps=15),
        asked("red", request_id="wide", width=128),
    ]
    images, engine = made(model, requests)
    for request, image in zip(requests, images, strict=True):
        color = next(word for word in request.prompt.split() if word in example.COLORS)
        wanted = (np.array(example.COLORS[color]) + 1) * 127.5
        assert image.image.shape == (request.height, request.width, 3)
        assert np.abs(image.image.astype(float) - wanted).max() <= 2, request.request_id
    stats = engine.stats()
    assert stats.forward_passes < 40, "they went together: one after the other takes 68"


def test_a_prompt_without_a_color_gives_one_of_them(example: ModuleType) -> None:
    """And the seed alone says which: not the mean of all, as a network that ignored its input would give."""
    requests = [
        asked("plain", request_id=str(seed), prompt="a wall", seed=seed, num_inference_steps=30) for seed in range(8)
    ]
    images, _ = made(example.PlainColors(), requests)
    palette = (np.array(list(example.COLORS.values())) + 1) * 127.5
    chosen = {int(np.abs(palette - image.image[0, 0]).max(1).argmin()) for image in images}
    assert len(chosen) > 1
    assert all(np.abs(palette - image.image[0, 0]).max(1).min() <= 6 for image in images)


def test_the_denoiser_finds_the_noise_that_was_put_in(example: ModuleType) -> None:
    """Against the definition: x_t of a red image and known noise, at a late timestep where red is certain."""
    model = example.PlainColors()
    [red] = model.encode([example.Text(prompt="red")])
    noise = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    clean = torch.tensor(example.COLORS["red"]).reshape(1, 3, 1, 1)
    for timestep in (50.0, 500.0, 900.0):
        alpha = model._alphas[int(timestep)]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        found = model.forward(noisy, torch.tensor([timestep]), {"colors": red["colors"].unsqueeze(0)})
        assert torch.allclose(found, noise, atol=1e-4)


def test_what_it_cannot_do_is_refused(example: ModuleType) -> None:
    with pytest.raises(InvalidRequest, match="sampler="):
        made(example.PlainColors(), [asked("red", sampler=SamplerType.HEUN)])
    with pytest.raises(InvalidRequest, match=r"loras='lora': model 'colors' does not support this"):
        made(example.PlainColors(), [asked("red", loras=(("neon", 1.0),))])


def test_the_example_writes_its_sheet(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example.main()
    shown = [tuple(np.asarray(Image.open(tmp_path / f"out/model_adapter-{i}.png"))[0, 0]) for i in range(4)]
    assert [max(range(3), key=lambda channel: color[channel]) for color in shown] == [0, 1, 2, 0]
    assert (tmp_path / "out/model_adapter.png").is_file()


def test_the_page_shows_this_very_code(example: ModuleType) -> None:
    """Every block of Python on the page is in the example, line by line; blank lines and indentation aside."""

    def lines(text: str) -> str:
        return "\n".join(line.strip() for line in text.splitlines() if line.strip())

    page = (EXAMPLES.parent / "docs" / "how-to" / "model-adapter.md").read_text()
    source = lines((EXAMPLES / "model_adapter.py").read_text())
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    assert len(blocks) > 3
    for block in blocks:
        assert lines(block) in source, block
