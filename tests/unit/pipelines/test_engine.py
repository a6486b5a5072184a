"""Pipelines in the engine: beside each other, beside step models, cancelled, refused, deterministic."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from calotype_shared.errors import GenerationFailed, InvalidRequest
from calotype_shared.schema.enums import OutputFormat, SamplerType
from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.engine.pipeline_run import PipelineRun
from calotype_worker.models import ModelPool, PipelineModel, load_model
from calotype_worker.models.pipeline.outputs import Output
from calotype_worker.request import GenerationRequest
from tests.models import write_tiny_sd
from tests.unit.pipelines.builders import flux1, sd, sound_and_mesh
from tests.unit.pipelines.driver import four, load
from tests.video_and_mesh_models import write_tiny_animatediff


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelPool:
    flux = tmp_path_factory.mktemp("flux")
    flux1.flux().save_pretrained(flux, safe_serialization=True)
    return ModelPool(
        [
            load_model("pipeline", source=str(folder), as_pipeline=True),
            load_model("flux", source=f"FluxPipeline:{flux}"),
            load_model("steps", source=str(folder)),
        ]
    )


@pytest.fixture
def engine(models: ModelPool) -> Iterator[Engine]:
    made = Engine(models)
    made.start()
    yield made
    made.stop()


def pipeline_of(models: ModelPool, name: str) -> PipelineModel:
    found = models.get(name)
    assert isinstance(found, PipelineModel)
    return found


def requests_of(models: ModelPool, name: str) -> list[GenerationRequest]:
    return [
        replace(request, model=name, request_id=f"{name}-{request.request_id}")
        for request in four(pipeline_of(models, name))
    ]


def levels(output: Output, image: np.ndarray) -> int:
    assert output.image is not None
    return int(np.abs(output.image.astype(int) - image.astype(int)).max())


@pytest.mark.slow
def test_two_pipelines_and_a_step_model(engine: Engine, models: ModelPool) -> None:
    """Requests of two pipelines and a family of the engine's own, at once: each as plain diffusers makes it alone."""
    requests = [*requests_of(models, "pipeline"), *requests_of(models, "flux")]
    plain = [pipeline_of(models, r.model).read(pipeline_of(models, r.model).plain(r)) for r in requests]
    own = replace(requests[1], model="steps", request_id="steps", sampler=SamplerType.PNDM)
    futures = [engine.submit(request) for request in [*requests, own]]
    for future, request, expected in zip(futures, requests, plain, strict=False):
        generated = future.result(300)
        assert levels(expected, generated.image) <= 1, request.request_id
        assert generated.steps_taken >= request.num_inference_steps
    # The same request by the family's own code.
    assert levels(plain[1], futures[-1].result(300).image) <= 1
    assert engine.stats().images >= 9
    assert engine.stats().mean_rows > 1.5


def test_cancelled(engine: Engine, models: ModelPool) -> None:
    """A cancelled request ends within a call; the next runs as ever."""
    slow = replace(requests_of(models, "pipeline")[0], num_inference_steps=900, request_id="slow")
    quick = requests_of(models, "pipeline")[1]
    future = engine.submit(slow)
    engine.submit(quick).result(300)
    assert engine.cancel("slow")
    engine.submit(replace(quick, request_id="after")).result(300)
    assert future.cancelled()
    done, total = 0, 900
    assert engine.progress("slow") is None
    assert done < total


def test_refused(engine: Engine, models: ModelPool) -> None:
    """What a pipeline does not take is refused with the field, and what its own checks refuse is the caller's fault."""
    request = requests_of(models, "pipeline")[0]
    with pytest.raises(InvalidRequest, match="init_image"):
        engine.submit(replace(request, init_image=np.zeros((64, 64, 3), np.uint8)))
    with pytest.raises(InvalidRequest, match="parameters='steps'"):
        engine.submit(replace(request, parameters={"steps": 3}))
    with pytest.raises(InvalidRequest, match=r"parameters\.clip_skip"):
        engine.submit(replace(request, parameters={"clip_skip": "two"}))
    with pytest.raises(InvalidRequest, match="sampler"):
        engine.submit(replace(requests_of(models, "flux")[0], sampler=SamplerType.LCM))
    flux = replace(requests_of(models, "flux")[0], parameters={"max_sequence_length": 4096})
    with pytest.raises(InvalidRequest, match="max_sequence_length"):
        engine.submit(flux).result(300)


def test_parameters(engine: Engine, models: ModelPool) -> None:
    """A parameter of the pipeline's own changes the image as it does in plain diffusers."""
    request = replace(requests_of(models, "pipeline")[1], parameters={"guidance_rescale": 0.7})
    model = pipeline_of(models, "pipeline")
    expected = model.read(model.plain(request))
    without = engine.submit(replace(request, parameters={}, request_id="without")).result(300).image
    assert levels(expected, engine.submit(request).result(300).image) <= 1
    assert levels(expected, without) > 1


def test_deterministic(folder: Path) -> None:
    """In deterministic mode nothing is merged, and each image is bit for bit that of plain diffusers."""
    model = load_model("tiny", source=str(folder), as_pipeline=True)
    assert isinstance(model, PipelineModel)
    requests = four(model)
    plain = [model.read(model.plain(request)) for request in requests]
    engine = Engine(model, EngineSettings(deterministic=True))
    engine.start()
    try:
        futures = [engine.submit(request) for request in requests]
        assert [levels(a, f.result(300).image) for a, f in zip(plain, futures, strict=True)] == [0] * 4
    finally:
        engine.stop()


def test_stopped(models: ModelPool) -> None:
    """An engine that stops ends runs where they sleep."""
    engine = Engine(models)
    engine.start()
    future = engine.submit(replace(requests_of(models, "pipeline")[0], num_inference_steps=900))
    engine.stop()
    assert future.cancelled()
    with pytest.raises(GenerationFailed):
        engine.submit(requests_of(models, "pipeline")[1])


def test_meshes() -> None:
    """A solid object comes as a mesh in its colors; one without a surface fails by itself, and says why."""
    engine = Engine(
        ModelPool([load(sound_and_mesh.shap_e(), name="solid"), load(sound_and_mesh.shap_e(solid=False), name="empty")])
    )
    engine.start()
    try:
        solid, empty = (
            replace(four(pipeline_of(engine.models, name))[0], model=name, output_format=OutputFormat.PLY)
            for name in ("solid", "empty")
        )
        made, none = engine.submit(solid), engine.submit(replace(empty, request_id="none"))
        mesh = made.result(300).mesh
        assert mesh is not None
        assert len(mesh.faces) > 100
        # Closed: as many faces meet at each edge in one direction as in the other, so it has an inside.
        edges = Counter((int(a), int(b)) for face in mesh.faces for a, b in zip(face, np.roll(face, -1), strict=True))
        assert all(edges[b, a] == count for (a, b), count in edges.items())
        assert len(np.unique(mesh.colors, axis=0)) > 10
        with pytest.raises(GenerationFailed, match="no surface"):
            none.result(300)
        with pytest.raises(InvalidRequest, match="square"):
            engine.submit(replace(solid, height=64, width=32))
    finally:
        engine.stop()


@pytest.mark.slow
def test_video_and_mesh(tmp_path: Path) -> None:
    """AnimateDiff and Shap-E run as any other: requests of other steps and guidance together, each as alone."""
    video = load_model("video", source=str(write_tiny_animatediff(tmp_path / "video")))
    mesh = load(sound_and_mesh.shap_e(), name="mesh")
    assert isinstance(video, PipelineModel)
    assert "text_to_video" in video.card.features
    assert "mp4" in video.card.output_formats
    engine = Engine(ModelPool([video, mesh]))
    engine.start()
    try:
        for model, frames in ((video, 4), (mesh, None)):
            requests = [
                replace(request, model=model.card.name, output_format=OutputFormat.GIF, num_frames=frames)
                for request in four(model)[:2]
            ]
            plain = [model.read(model.plain(request)) for request in requests]
            made = [future.result(300) for future in [engine.submit(request) for request in requests]]
            for generated, expected in zip(made, plain, strict=True):
                assert generated.frames is not None
                assert expected.frames is not None
                assert np.abs(generated.frames.astype(int) - expected.frames.astype(int)).max() <= 1
                moves = np.abs(np.diff(generated.frames.astype(int), axis=0)).max(axis=(1, 2, 3))
                assert (moves > 0).all(), "two frames in a row are equal"
    finally:
        engine.stop()


def test_only_samplers_that_know_the_noise_schedule_are_offered() -> None:
    """Shap-E's betas follow an exponential that most schedulers cannot make; its own sampler is the default."""
    card = load(sound_and_mesh.shap_e()).card
    assert card.default_sampler == card.samplers[0] == "heun"
    assert "ddim" not in card.samplers
    assert "ddim" in load(sd.stable_diffusion()).card.samplers


def test_progress_with_a_copied_scheduler() -> None:
    """A pipeline may copy its scheduler, as those of video with sound do; the copy keeps its own state, uncounted."""
    run = PipelineRun("copied", seed=0)
    scheduler = DDIMScheduler()
    run.follow(scheduler)
    scheduler.set_timesteps(4)
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(9)
    assert len(scheduler.timesteps) == run.total_steps == 4
    assert len(copied.timesteps) == 9
    sample = torch.ones(1, 4, 8, 8)
    for own in (scheduler, copied, scheduler):
        own.step(sample, own.timesteps[0], sample)
    assert run.steps_done == 2
    # Pipelines look these up.
    assert type(scheduler) is DDIMScheduler
    assert "generator" in inspect.signature(scheduler.step).parameters
