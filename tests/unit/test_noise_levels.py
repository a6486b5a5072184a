"""Models with other noise levels than Stable Diffusion's: run as what they are, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.enums import SamplerType
from calotype_shared.schema.resolve import resolve
from calotype_worker.models import load_model
from calotype_worker.sampling import Trajectory, build_table
from calotype_worker.sampling.samplers import samplers_following
from tests import family_models as tiny
from tests.models import tiny_pipeline
from tests.unit.published import apart, draw, plain, request, write_with

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSXL = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [
        (diffusers.EDMEulerScheduler(**COSXL), "euler"),
        (diffusers.EDMDPMSolverMultistepScheduler(), "dpmpp_2m"),
        (
            diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
            "dpmpp_2m_sde_karras",
        ),
        (diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True), "dpmpp_2m_karras"),
        (diffusers.TCDScheduler(**BETAS), "tcd"),
        (diffusers.KDPM2AncestralDiscreteScheduler(**BETAS), "dpm2_a"),
        (diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=1), "model"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "unipc"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_a_model_runs_with_its_own_scheduler(scheduler: Any, sampler: str, tmp_path: Path) -> None:
    """The first sampler of its card is its own, and its images are those of plain diffusers."""
    folder = write_with(tmp_path / "model", scheduler)
    model = load_model("m", source=str(folder))
    assert model.card.samplers[0] == sampler
    assert apart(draw(model), plain(folder)) <= 1


def test_edm_previews_and_image_to_image(tmp_path: Path) -> None:
    """Both need the noise levels, which are not those of betas."""
    folder = write_with(tmp_path / "model", diffusers.EDMEulerScheduler(**COSXL))
    model: Any = load_model("m", source=str(folder))
    scheduler = model.make_scheduler(request(model))
    assert set(model.card.samplers) == {"euler", "dpmpp_2m"}
    sample, output = torch.randn(1, 4, 8, 8) * 50, torch.randn(1, 4, 8, 8)
    at = scheduler.timesteps[2:3]
    scheduler.set_begin_index(2)
    scaled = scheduler.scale_model_input(sample, at[0])
    expected = scheduler.step(output, at[0], sample).pred_original_sample
    torch.testing.assert_close(model.predicted_original(scaled, output, at), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidRequest, match=r"refiner=0.8: EDMEulerScheduler has no training timesteps"):
        Trajectory.whole(model.make_scheduler(request(model))).stopping_early(0.8)


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.CMStochasticIterativeScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_unknown_noise_levels_are_refused(scheduler: Any, tmp_path: Path) -> None:
    folder = write_with(tmp_path / "model", scheduler)
    with pytest.raises(ModelLoadError, match=f"'m': its scheduler {type(scheduler).__name__} has noise levels"):
        load_model("m", source=str(folder))


def test_samplers_that_would_ignore_a_part_of_the_schedule_are_not_offered() -> None:
    """Heun and PNDM know no zero terminal SNR, PNDM does not know networks that predict the image."""
    zero = samplers_following(diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, clip_sample=False))
    assert not {SamplerType.HEUN, SamplerType.PNDM} & set(zero)
    assert {SamplerType.DDIM, SamplerType.EULER, SamplerType.UNIPC} <= set(zero)
    sample = samplers_following(diffusers.EulerDiscreteScheduler(**BETAS, prediction_type="sample"))
    assert SamplerType.PNDM not in sample
    for scheduler in (diffusers.DEISMultistepScheduler(**BETAS), diffusers.SASolverScheduler(**BETAS)):
        scheduler.set_timesteps(5)
        assert len(build_table(Trajectory.whole(scheduler))) == 5


@pytest.mark.parametrize(
    ("make", "defaults"),
    [
        (tiny_pipeline, (None, None, None)),  # a config's own: DDIM, 50 steps, 7.5
        (tiny.tiny_sdxl, ("euler", None, 5.0)),
        (tiny.tiny_sd3, ("euler", 28, 7.0)),
        (tiny.tiny_flux, ("euler", 28, 3.5)),
        (lambda: tiny.tiny_flux(guidance=False), ("euler", 4, 0.0)),
        (
            lambda: scheduled(diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")),
            ("euler_a", 4, 0.0),
        ),
        (lambda: scheduled(diffusers.LCMScheduler(clip_sample=False)), ("lcm", 4, 0.0)),
        (lambda: scheduled(diffusers.TCDScheduler()), ("tcd", 4, 0.0)),
        (lambda: scheduled(diffusers.DEISMultistepScheduler()), ("deis", None, None)),
    ],
)
def test_a_card_has_the_models_own_defaults(
    make: Callable[[], Any], defaults: tuple[str | None, int | None, float | None], tmp_path: Path
) -> None:
    """From its pipeline's signature and scheduler; calotype.json overrides them, and jobs that say nothing get them."""
    folder = tiny.write(make(), tmp_path / "model")
    (folder / "calotype.json").write_text('{"native_sizes": [[64, 64]]}')
    card = load_model("m", source=str(folder)).card
    assert (card.default_sampler, card.default_steps, card.default_guidance) == defaults
    resolved = resolve(GenerationConfig(prompt="a", model="m"), {"m": card})
    wanted = tuple(own if own is not None else usual for own, usual in zip(defaults, ("ddim", 50, 7.5), strict=True))
    assert (resolved.sampler, resolved.num_inference_steps, resolved.guidance_scale) == wanted

    notes = {"default_sampler": "euler", "default_steps": 6, "default_guidance": 2.0}
    (folder / "calotype.json").write_text(json.dumps(notes | {"native_sizes": [[64, 64]]}))
    card = load_model("m", source=str(folder)).card
    assert (card.default_sampler, card.default_steps, card.default_guidance) == ("euler", 6, 2.0)


def scheduled(scheduler: Any) -> Any:
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler
    return pipeline
