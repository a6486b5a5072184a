"""Previews of pipeline models, and that one that fails is nobody's end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine
from calotype_worker.models import PipelineModel, StepModel, load_model
from calotype_worker.models.pipeline.followed import Step, follow
from calotype_worker.request import GenerationRequest
from tests.unit.pipelines import builders
from tests.unit.pipelines.driver import four, load


@pytest.fixture(scope="module")
def demo() -> PipelineModel:
    """The bundled model, whose images are of something."""
    model = load_model("demo", as_pipeline=True)
    assert isinstance(model, PipelineModel)
    return model


def likeness(preview: np.ndarray, image: np.ndarray) -> float:
    """The correlation of a preview with the image, at the preview's size."""
    small = Image.fromarray(image).resize(preview.shape[1::-1], Image.Resampling.BOX)
    return float(np.corrcoef(preview.ravel(), np.asarray(small).ravel())[0, 1])


def test_previews_show_the_image(demo: PipelineModel) -> None:
    """They are like the image, more so as steps go on, and better once the model has made images."""
    shown: dict[str, list[tuple[int, np.ndarray]]] = {}
    engine = Engine(demo, on_preview=lambda name, step, image: shown.setdefault(name, []).append((step, image)))
    engine.start()
    try:
        request = replace(
            four(demo)[0],
            prompt="a red circle on a yellow background",
            num_inference_steps=8,
            guidance_scale=4.0,
            sampler=SamplerType.DPMPP_2M,
            width=64,
            height=64,
        )
        assert "preview" in demo.card.features
        for name in ("first", "second"):
            made = engine.submit(replace(request, request_id=name, preview_every=2, seed=len(name))).result(300)
            assert [step for step, _ in shown[name]] == [2, 4, 6]
            assert shown[name][0][1].shape == (8, 8, 3)
            assert likeness(shown[name][-1][1], made.image) > 0.8
    finally:
        engine.stop()


def test_a_failing_preview(demo: PipelineModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a preview costs the preview: its request and the engine go on."""
    tried = []

    def fail(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("no such thing")

    monkeypatch.setattr(demo._previews, "image", fail)
    engine = Engine(demo, on_preview=lambda *_: pytest.fail("there was none"))
    engine.start()
    try:
        request = replace(four(demo)[0], num_inference_steps=3, preview_every=1, width=64, height=64)
        assert engine.submit(request).result(300).image.shape == (64, 64, 3)
        assert engine.submit(replace(request, request_id="next")).result(300).image.shape == (64, 64, 3)
        assert len(tried) == 4
    finally:
        engine.stop()


def test_a_failing_preview_of_a_step_model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where the engine steps the model itself."""
    model = load_model("tiny", source=str(tiny_model))
    assert isinstance(model, StepModel)
    tried = []

    def fail(_: torch.Tensor) -> Any:
        tried.append(1)
        raise RuntimeError("no such thing")

    monkeypatch.setattr(model, "preview", fail)
    engine = Engine(model, on_preview=lambda *_: pytest.fail("there was none"))
    engine.start()
    try:
        made = [
            engine.submit(request_of(name, preview_every=every)).result(300) for name, every in (("a", 1), ("b", 0))
        ]
        assert [one.image.shape for one in made] == [(64, 64, 3)] * 2
        assert tried
    finally:
        engine.stop()


def request_of(name: str, *, preview_every: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt="a fox",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=1.0,
        seed=1,
        sampler=SamplerType.DDIM,
        preview_every=preview_every,
    )


def test_which_models_have_them() -> None:
    """Latents in tokens have previews, too; sound has none, and a request for one is refused."""
    assert "preview" in load(builders.flux(), side=64).card.features
    sound = load(builders.stable_audio())
    assert "preview" not in sound.card.features
    engine = Engine(sound)
    with pytest.raises(InvalidRequest, match="preview_every"):
        engine.submit(replace(four(sound)[0], preview_every=1))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DDIMScheduler", {"clip_sample": False}),
        ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ],
)
def test_the_predicted_sample(kind: str, options: dict[str, Any]) -> None:
    """From a network that knows the clean sample and the noise, each step's estimate is that sample."""
    import diffusers

    scheduler = getattr(diffusers, kind)(**options)
    estimates: list[torch.Tensor] = []
    totals: list[int] = []
    follow(scheduler, begun=totals.append, stepped=lambda step: estimates.append(step.clean()))
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn((1, 4, 8, 8), generator=generator, dtype=torch.float64) for _ in range(2))
    sample = noise * float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else noise
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index].double() if hasattr(scheduler, "sigmas") else torch.tensor(0.0)
        kinds = (
            getattr(scheduler.config, "prediction_type", "flow_prediction"),
            float(getattr(scheduler, "init_noise_sigma", 1)),
        )
        if kinds[0] == "flow_prediction":
            output = (sample - clean) / sigma
        else:
            if kinds[1] > 1.001:
                signal, share = torch.tensor(1.0).double(), sigma
            else:
                alpha = scheduler.alphas_cumprod[int(timestep)].double()
                signal, share = alpha.sqrt(), (1 - alpha).sqrt()
            epsilon = (sample - signal * clean) / share
            norm = (signal**2 + share**2).sqrt()
            velocity = (signal * epsilon - share * clean) / norm
            output = velocity if kinds[0] == "v_prediction" else epsilon
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    assert totals == [5]
    assert len(estimates) == 5
    assert max(float((estimate - clean).abs().max()) for estimate in estimates) < 1e-2


def test_a_copy_of_the_scheduler_is_its_own() -> None:
    """Pipelines with sound copy their scheduler; the copy neither steps the original nor counts as progress."""
    import copy

    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    steps: list[Step] = []
    follow(scheduler, begun=lambda _: None, stepped=steps.append)
    scheduler.set_timesteps(3)
    other = copy.deepcopy(scheduler)
    sample = torch.ones(1, 4)
    for timestep in scheduler.timesteps:
        scheduler.step(sample, timestep, sample)
        other.step(sample, timestep, sample)
    assert len(steps) == 3
    assert scheduler.step_index == other.step_index == 3
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
