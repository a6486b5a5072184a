"""Sampler tables against the schedulers they were read off."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import SamplerType
from calotype_worker.sampling import SamplerTable, TableCache, build_table, make_scheduler
from calotype_worker.sampling import table as table_module
from calotype_worker.sampling.probe import NotLinear
from calotype_worker.sampling.samplers import SAMPLERS
from calotype_worker.sampling.table import trajectory_error
from calotype_worker.sampling.trajectory import Trajectory

SD_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("change", [{}, {"timestep_spacing": "trailing"}, {"prediction_type": "v_prediction"}], ids=str)
def test_every_sampler_has_a_table(sampler: SamplerType, change: dict[str, Any]) -> None:
    """From one step to fifty, on the three kinds of config in use, within a few float32 roundings."""
    for steps in (1, 2, 3, 5, 10, 15, 20, 50):
        scheduler = make_scheduler(sampler, SD_CONFIG | change, steps)
        table = build_table(Trajectory.whole(scheduler))
        assert trajectory_error(table, Trajectory.whole(scheduler)) < 2e-5
        assert len(table) == len(scheduler.timesteps)


def test_evaluations_are_counted_not_steps() -> None:
    """PNDM evaluates the network once more than asked, Heun nearly twice as often."""
    tables = {s: build_table(Trajectory.whole(make_scheduler(s, SD_CONFIG, 20))) for s in SAMPLERS}
    assert len(tables[SamplerType.DDIM]) == 20
    assert len(tables[SamplerType.PNDM]) == 21
    assert len(tables[SamplerType.HEUN]) == 39


def test_noise_is_drawn_where_the_scheduler_draws_it() -> None:
    """Even where its weight is zero: a draw left out would shift every later one."""
    config = SD_CONFIG | {"steps_offset": 0}  # so that the last timestep is 0, where DDPM draws no more
    draws = {s: build_table(Trajectory.whole(make_scheduler(s, config, 10))).draws_noise for s in SAMPLERS}
    assert draws[SamplerType.EULER_A] == (True,) * 10
    assert draws[SamplerType.DDPM] == (True,) * 9 + (False,)
    assert draws[SamplerType.LCM] == (True,) * 9 + (False,)
    assert not any(draws[SamplerType.DDIM])


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(clip_sample=True),
        diffusers.DDPMScheduler(clip_sample=True),
        diffusers.DPMSolverMultistepScheduler(thresholding=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_sampler_that_clips_has_no_table(scheduler: Any) -> None:
    """Clipping is not linear; the check on a random trajectory must notice."""
    scheduler.set_timesteps(10)
    with pytest.raises(NotLinear, match="the table is off by"):
        build_table(Trajectory.whole(scheduler))


def test_a_wrong_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number matters: a table with any one matrix slightly off fails its verification."""
    scheduler = make_scheduler(SamplerType.UNIPC, SD_CONFIG, 10)
    pack = table_module._pack
    for index in range(10):

        def spoiled(steps: Any, index: int = index) -> torch.Tensor:
            matrices = pack(steps)
            matrices[index, 0, 0] *= 1.001
            return matrices

        monkeypatch.setattr(table_module, "_pack", spoiled)
        with pytest.raises(NotLinear, match="off by"):
            build_table(Trajectory.whole(scheduler))


def test_the_cache_builds_once_and_remembers_that_there_is_no_table() -> None:
    """A table costs milliseconds to build; a request should not pay twice."""
    made = []

    def scheduler(clip: bool) -> Any:
        made.append(clip)
        scheduler = diffusers.DDIMScheduler(clip_sample=clip)
        scheduler.set_timesteps(5)
        return scheduler

    cache = TableCache(capacity=2)
    for _ in range(3):
        assert isinstance(cache.get("a", lambda: Trajectory.whole(scheduler(False))), SamplerTable)
        assert cache.get("b", lambda: Trajectory.whole(scheduler(True))) is None
    assert made == [False, True]
    cache.get("c", lambda: Trajectory.whole(scheduler(False)))  # "a" was used before "b": it goes
    cache.get("a", lambda: Trajectory.whole(scheduler(False)))
    assert len(made) == 4


def test_more_steps_than_a_sampler_can_do_is_refused_clearly() -> None:
    """LCM was distilled for 50 steps; the message names the field and the sampler."""
    with pytest.raises(InvalidRequest, match=r"num_inference_steps=80: sampler 'lcm'"):
        make_scheduler(SamplerType.LCM, SD_CONFIG, 80)


def test_steps_off_the_end_of_the_schedule_are_refused_clearly() -> None:
    """A thousand steps with an offset of one ask for timestep 1000 of 0 to 999: diffusers' IndexError says nothing."""
    with pytest.raises(
        InvalidRequest, match="num_inference_steps=1000: DDIMScheduler does not support this number of steps"
    ):
        build_table(Trajectory.whole(make_scheduler(SamplerType.DDIM, SD_CONFIG, 1000)))
