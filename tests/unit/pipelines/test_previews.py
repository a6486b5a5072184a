"""Previews of pipeline models, and that one that fails is nobody's end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine
from calotype_worker.models import PipelineModel, StepModel, load_model
from calotype_worker.models.pipeline.followed import Step, follow
from calotype_worker.models.pipeline.preview import Previews
from calotype_worker.request import GenerationRequest
from tests.unit.pipelines.builders import flux1, sd, sound_and_mesh
from tests.unit.pipelines.driver import four, load


@pytest.fixture(scope="module")
def demo() -> PipelineModel:
    """The bundled model, whose images are of something."""
    model = load_model("demo", as_pipeline=True)
    assert isinstance(model, PipelineModel)
    return model


@pytest.fixture(scope="module")
def stepped() -> StepModel:
    model = load_model("demo")
    assert isinstance(model, StepModel)
    return model


def previews_of(model: Any, request: GenerationRequest) -> list[tuple[int, np.ndarray]]:
    """All previews of a request."""
    shown: list[tuple[int, np.ndarray]] = []
    engine = Engine(model, on_preview=lambda _, step, image: shown.append((step, image)))
    engine.start()
    try:
        engine.submit(request).result(300)
    finally:
        engine.stop()
    return shown


@pytest.mark.parametrize(
    "sampler",
    [SamplerType.DDIM, SamplerType.EULER, SamplerType.DPMPP_2M_KARRAS, SamplerType.UNIPC, SamplerType.EULER_A],
)
def test_previews_are_those_of_the_step_engine(demo: PipelineModel, stepped: StepModel, sampler: SamplerType) -> None:
    """Step by step as of the bundled model where the engine has code of its own for it."""
    request = replace(
        four(demo)[0],
        prompt="a blue star on a yellow background",
        num_inference_steps=6,
        guidance_scale=4.0,
        sampler=sampler,
        width=96,
        height=64,
        preview_every=2,
    )
    assert "preview" in demo.card.features
    here, there = previews_of(demo, request), previews_of(stepped, request)
    assert [step for step, _ in here] == [step for step, _ in there] == [2, 4]
    for (_, own), (_, expected) in zip(here, there, strict=True):
        assert own.shape == expected.shape == (8, 12, 3)
        assert np.abs(own.astype(int) - expected.astype(int)).max() <= 2
    assert here[0][1].std() > 10


@pytest.mark.parametrize("build", [flux1.flux, sd.sd3])
def test_previews_of_tokens_and_shifted_latents(build: Callable[[], Any], tmp_path: Path) -> None:
    """Flux packs 2x2 latents into a token, and like SD 3 shifts them; of both the engine has code to compare with."""
    build().save_pretrained(tmp_path, safe_serialization=True)
    (tmp_path / "calotype.json").write_text('{"native_sizes": [[256, 256]]}')  # a first run of a quarter of it
    model, step_model = load_model("a", source=str(tmp_path), as_pipeline=True), load_model("a", source=str(tmp_path))
    assert isinstance(model, PipelineModel)
    request = replace(
        four(model)[1], width=64, height=96, num_inference_steps=4, preview_every=3, sampler=SamplerType.EULER
    )
    [(_, own)], [(_, expected)] = previews_of(model, request), previews_of(step_model, request)
    assert own.shape == (12, 8, 3)
    assert np.abs(own.astype(int) - expected.astype(int)).max() <= 2
    assert own.std() > 1


def test_a_failing_preview(demo: PipelineModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a preview costs the preview: its request and the engine go on."""
    tried = []

    def fail(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("no such thing")

    monkeypatch.setattr(Previews, "image", fail)
    engine = Engine(demo, on_preview=lambda *_: pytest.fail("there was none"))
    engine.start()
    try:
        request = replace(four(demo)[0], num_inference_steps=3, preview_every=1, width=64, height=64)
        assert engine.submit(request).result(300).image.shape == (64, 64, 3)
        assert engine.submit(replace(request, request_id="next")).result(300).image.shape == (64, 64, 3)
        assert len(tried) == 4
    finally:
        engine.stop()


def test_which_models_have_them() -> None:
    """Sound has none, and a request for one is refused."""
    sound = load(sound_and_mesh.stable_audio())
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
