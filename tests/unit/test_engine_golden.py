"""Golden tests: every sampler in ONE mixed, staggered batch against the plain diffusers pipeline run alone.

The negative controls break one thing each and must miss by far: a comparison that cannot fail proves nothing.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine, EngineSettings, Generated, GenerationRequest
from calotype_worker.engine.step_batch import StepBatch
from calotype_worker.engine.trace import NoopTracer
from calotype_worker.models import StepModel, load_model
from calotype_worker.sampling import make_scheduler
from calotype_worker.sampling.samplers import SAMPLERS

TOLERANCE = 1.0  # of 255 levels, after rounding to uint8
CAUGHT = 12.0  # what a wrong timestep, guidance, generator or prompt must miss by, at least


def mixed_requests(size: tuple[int, int] = (64, 64)) -> list[GenerationRequest]:
    """Every sampler, guided and not, three step counts, with and without a negative prompt."""
    return [
        GenerationRequest(
            request_id=sampler.value,
            prompt=f"image {index}",
            negative_prompt="blurry" if index % 2 else "",
            width=size[0],
            height=size[1],
            num_inference_steps=(8, 13, 20)[index % 3],
            guidance_scale=(1.0, 7.5, 3.0)[index // 2 % 3],
            seed=100 + index,
            sampler=sampler,
        )
        for index, sampler in enumerate(SAMPLERS)
    ]


@pytest.fixture(scope="session")
def plain_pipeline(tiny_folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def alone(pipeline: Any, model: Any, request: GenerationRequest) -> np.ndarray:
    """The same image by plain diffusers: uint8 (H, W, 3)."""
    pipeline.scheduler = make_scheduler(request.sampler, model.scheduler_config, request.num_inference_steps)
    image = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    return np.asarray(image)


def levels(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, of 255."""
    return float(np.abs(a.astype(int) - b.astype(int)).max())


class Gate(NoopTracer):
    """Holds the engine's thread after a step until it is let through, so that a busy machine changes no batch."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._allowed = 0.0  # steps
        self.holds = False

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        if not name.startswith("step"):
            return
        with self._changed:
            self.holds = True
            self._changed.wait_for(lambda: self._allowed > 0)
            self._allowed -= 1
            self.holds = False

    def allow(self, steps: float) -> None:
        with self._changed:
            self._allowed += steps
            self._changed.notify()


def run_staggered(engine: Engine, requests: list[GenerationRequest]) -> list[Generated]:
    """Submit a request whenever the engine has taken another two steps, so that rows join batches in mid-flight."""
    gate = engine._trace = Gate()
    futures = []
    try:
        for request in requests:
            futures.append(engine.submit(request))
            gate.allow(2)
            while not (gate.holds and gate._allowed == 0) and not all(future.done() for future in futures):
                time.sleep(0.001)
    finally:
        gate.allow(math.inf)
    return [future.result(timeout=120) for future in futures]


@pytest.fixture(scope="session")
def references(plain_pipeline: Any, tiny_step_model: StepModel) -> dict[str, np.ndarray]:
    return {r.request_id: alone(plain_pipeline, tiny_step_model, r) for r in mixed_requests()}


def test_a_mixed_batch_gives_the_images_of_the_plain_pipeline(
    make_engine: Any, references: dict[str, np.ndarray]
) -> None:
    """Ten samplers, three step counts, three guidance scales, joining and leaving at any step."""
    engine = make_engine(max_rows=16)
    results = run_staggered(engine, mixed_requests())
    differences = {r.request_id: levels(r.image, references[r.request_id]) for r in results}
    assert max(differences.values()) <= TOLERANCE, differences
    stats = engine.stats()
    assert stats.fallback_steps == 0
    assert stats.mean_rows > 4, "the requests did not share forward passes, so nothing was shown"


def test_sizes_that_are_not_square_match_too(make_engine: Any, plain_pipeline: Any, tiny_step_model: StepModel) -> None:
    """Two sizes in one engine are two groups; neither disturbs the other."""
    engine = make_engine(max_rows=16)
    requests = mixed_requests()[:3] + [
        GenerationRequest(**{**vars(r), "request_id": f"wide-{r.request_id}"}) for r in mixed_requests((96, 64))[10:13]
    ]
    for request, result in zip(requests, run_staggered(engine, requests), strict=True):
        assert result.image.shape == (request.height, request.width, 3)
        assert levels(result.image, alone(plain_pipeline, tiny_step_model, request)) <= TOLERANCE


def test_v_prediction_models_match(tmp_path: Path, make_engine: Any) -> None:
    """Stable Diffusion 2.x predicts velocity; only the scheduler's config says so."""
    from diffusers import StableDiffusionPipeline

    from tests.models import write_tiny_sd

    folder = write_tiny_sd(tmp_path / "v", seed=3, prediction_type="v_prediction")
    model = load_model("tiny-v", source=str(folder))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    requests = mixed_requests()[:10]
    for request, result in zip(requests, run_staggered(make_engine(model, max_rows=16), requests), strict=True):
        assert levels(result.image, alone(pipeline, model, request)) <= TOLERANCE


def test_the_fallback_gives_the_same_images(
    make_engine: Any, references: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every table refused, each row steps through its own scheduler object in the same batch."""
    from calotype_worker.sampling import table

    monkeypatch.setattr(table, "TOLERANCE", -1.0)
    engine = make_engine(max_rows=16)
    results = run_staggered(engine, mixed_requests()[:10])
    assert max(levels(r.image, references[r.request_id]) for r in results) <= TOLERANCE
    assert engine.stats().fallback_steps == sum(r.steps_taken for r in results)


def test_tables_and_fallback_rows_share_a_batch(
    make_engine: Any, references: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the samplers without a table, half with one, in the same forward passes."""
    from calotype_worker.engine import engine as engine_module
    from calotype_worker.sampling import TableCache

    class Half(TableCache):
        def get(self, key: Any, make_scheduler: Any) -> Any:
            return (
                None
                if key[0] in (SamplerType.UNIPC, SamplerType.EULER, SamplerType.DDPM)
                else super().get(key, make_scheduler)
            )

    monkeypatch.setattr(engine_module, "TableCache", Half)
    engine = make_engine(max_rows=16)
    results = run_staggered(engine, mixed_requests()[:10])
    assert max(levels(r.image, references[r.request_id]) for r in results) <= TOLERANCE
    assert 0 < engine.stats().fallback_steps < sum(r.steps_taken for r in results)


# ---- negative controls


NOISY = (SamplerType.EULER_A, SamplerType.DDPM, SamplerType.LCM)  # which draw noise at their steps


def missed_by(model: StepModel, references: dict[str, np.ndarray]) -> dict[GenerationRequest, float]:
    """By how many levels each image of a small mixed run is off."""
    requests = mixed_requests()[:10]
    engine = Engine(model, EngineSettings(max_rows=16))
    engine.start()
    try:
        results = [f.result(timeout=120) for f in [engine.submit(r) for r in requests]]
    finally:
        engine.stop()
    return {r: levels(made.image, references[r.request_id]) for r, made in zip(requests, results, strict=True)}


def test_control_without_a_fault_nothing_is_caught(
    tiny_step_model: StepModel, references: dict[str, np.ndarray]
) -> None:
    """What the controls below break is all that makes them miss."""
    assert max(missed_by(tiny_step_model, references).values()) <= TOLERANCE


def test_control_a_wrong_timestep_is_caught(
    tiny_step_model: StepModel, references: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row given the first row's timestep, as a batch with one scalar timestep would."""
    predict = tiny_step_model.predict
    monkeypatch.setattr(
        tiny_step_model,
        "predict",
        lambda rows: predict(replace(rows, timesteps=rows.timesteps[:1].expand(len(rows.timesteps)))),
    )
    first, *others = missed_by(tiny_step_model, references).values()
    assert first <= TOLERANCE, "the timestep is its own"
    assert sum(off > CAUGHT for off in others) > 5


def test_control_shared_guidance_is_caught(
    tiny_step_model: StepModel, references: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every guided row given the first one's guidance scale."""
    lay_out = StepBatch._lay_out_rows

    def shared(self: StepBatch, members: Any) -> Any:
        rows = lay_out(self, members)
        if len(rows.guidance):
            rows.guidance[:] = rows.guidance[0].clone()
        return rows

    monkeypatch.setattr(StepBatch, "_lay_out_rows", shared)
    missed = missed_by(tiny_step_model, references)
    assert max(missed.values()) > CAUGHT
    assert max(off for r, off in missed.items() if r.guidance_scale <= 1) <= TOLERANCE, "it has no guidance to lose"


def test_control_a_shared_generator_is_caught(
    tiny_step_model: StepModel, references: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows drawing their step noise from one generator."""
    join = StepBatch.join

    def shared(self: StepBatch, members: Any) -> None:
        join(self, members)
        for row in self.members:
            row.generator = self.members[0].generator
            row.ahead.clear()  # what was drawn beforehand is its own

    monkeypatch.setattr(StepBatch, "join", shared)
    missed = missed_by(tiny_step_model, references)
    assert max(missed.values()) > CAUGHT
    assert max(off for r, off in missed.items() if r.sampler not in NOISY) <= TOLERANCE, "it draws no noise"


def test_control_swapped_prompts_are_caught(
    tiny_step_model: StepModel, references: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditioning rows out of order by one."""
    predict = tiny_step_model.predict
    monkeypatch.setattr(
        tiny_step_model,
        "predict",
        lambda rows: predict(replace(rows, conditioning={"text": rows.conditioning["text"].roll(1, 0)})),
    )
    assert sum(off > CAUGHT for off in missed_by(tiny_step_model, references).values()) > 5
