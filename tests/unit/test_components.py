"""The founding document's parts by themselves, against diffusers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import SamplerType
from calotype_worker import DiffusionModel, GenerationConfig, NoiseScheduler, TextEncoder, UNetModel, VAEDecoder
from calotype_worker.sampling import make_scheduler
from calotype_worker.sampling.samplers import SAMPLERS

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s not in (SamplerType.LCM, SamplerType.TCD)])
def test_stepping_by_hand_goes_the_schedulers_way(sampler: SamplerType) -> None:
    """Also for samplers that remember, timesteps that come twice, and input scaling."""
    ours = NoiseScheduler(**BETAS, sampler=sampler, num_inference_steps=12)  # type: ignore[arg-type]
    theirs: Any = make_scheduler(sampler, {**BETAS, "prediction_type": "epsilon"}, 12)
    source = torch.Generator().manual_seed(0)
    noise_a, noise_b = (torch.Generator().manual_seed(1) for _ in range(2))
    a = b = torch.randn((1, 2, 3, 3), generator=source)
    assert torch.equal(ours.timesteps, theirs.timesteps.float())
    for timestep in theirs.timesteps:
        output = torch.randn(a.shape, generator=source)
        theirs.scale_model_input(b, timestep)
        arguments = {"generator": noise_b} if "generator" in theirs.step.__code__.co_varnames else {}
        b = theirs.step(output, timestep, b, return_dict=False, **arguments)[0]
        a = ours.step(output, float(timestep), a, generator=noise_a)
        assert torch.allclose(a, b, rtol=2e-4, atol=2e-4 * float(b.abs().max()))
    original, noise = torch.randn(2, 1, 4, 4).unbind()
    ddpm: Any = make_scheduler(SamplerType.DDPM, {**BETAS, "prediction_type": "epsilon"}, 12)
    expected = ddpm.add_noise(original, noise, torch.tensor([500]))
    assert torch.allclose(ours.add_noise(original, noise, 500), expected, atol=1e-6)


def test_arrays_come_back_as_arrays() -> None:
    """And a timestep that the schedule does not have is named."""
    scheduler = NoiseScheduler()
    image = np.ones((3, 4, 4), dtype=np.float32)
    assert isinstance(scheduler.step(image, 999, image), np.ndarray)
    assert isinstance(scheduler.add_noise(image, image, 10), np.ndarray)
    with pytest.raises(InvalidRequest, match=r"timestep=1000: is not one of this scheduler's timesteps"):
        scheduler.step(image, 1000, image)


def test_the_parts_put_together_make_the_models_image() -> None:
    """Text encoder, network, schedule and decoder by hand, against `generate`, which has this one model."""
    with DiffusionModel() as model:
        config = GenerationConfig(
            prompt="a red circle", width=64, height=64, num_inference_steps=6, guidance_scale=1.0, seed=3
        )
        expected = model.generate(config).image_data
        text, unet, decoder = TextEncoder(model), UNetModel(model), VAEDecoder(model)
        base = dict(model.step_model.scheduler_config)  # type: ignore[attr-defined]
        scheduler: Any = make_scheduler(config.sampler, base, config.num_inference_steps)
        latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
        embedding = text.encode(config.prompt)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(unet(latents, timestep, embedding), timestep, latents, return_dict=False)[0]
        made = decoder.decode(latents)[0]
        with pytest.raises(InvalidRequest, match="model='second': is not a known model; use one of: demo"):
            model.generate_batch([GenerationConfig(prompt="a", ensemble=("second",))])
    assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1


def test_a_config_may_change_but_not_to_nonsense() -> None:
    """As the founding document's loop over seeds does."""
    config = GenerationConfig(prompt="a")
    config.seed = 7
    assert config.seed == 7
    with pytest.raises(InvalidRequest, match=r"seed=-1.*at least 0"):
        config.seed = -1
    with pytest.raises(InvalidRequest, match="num_inference_steps=0"):
        GenerationConfig(prompt="a", num_inference_steps=0)
    assert config.seed == 7
