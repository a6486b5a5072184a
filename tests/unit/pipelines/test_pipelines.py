"""Pipelines of many classes: requests that run together give what each gives alone by plain diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.unit.pipelines import builders
from tests.unit.pipelines.driver import counted, difference, four, load, together, without_merging


class Case(NamedTuple):
    build: Callable[[], Any]
    denoiser: str
    calls_per_step: int = 1  # of a request with guidance
    tolerance: float = 1e-5


CASES = {
    "stable_diffusion": Case(builders.stable_diffusion, "unet"),
    "flux": Case(builders.flux, "transformer"),
    "qwen_image": Case(builders.qwen_image, "transformer", calls_per_step=2),
}


@pytest.mark.parametrize("name", CASES)
def test_together_as_alone(name: str) -> None:
    """Four different requests equal plain diffusers within rounding, and bit for bit where nothing is merged.

    They differ in prompt, seed, steps and guidance, and take no more denoiser calls than the longest of them alone.
    """
    case = CASES[name]
    model = load(case.build())
    requests = four(model)
    plain, alone = [], []
    for request in requests:
        with counted(model, case.denoiser) as calls:
            plain.append(model.plain(request))
        alone.append(calls.total())

    with counted(model, case.denoiser) as calls:
        runs = together(model, requests)
    apart = without_merging(model, requests)

    for run, other, expected in zip(runs, apart, plain, strict=True):
        assert run.error is None
        assert difference(run.result, expected) <= case.tolerance
        assert difference(other.result, expected) == 0.0
    assert calls.total() <= max(alone), model.summary()
    assert runs[2].steps_done == runs[2].total_steps
