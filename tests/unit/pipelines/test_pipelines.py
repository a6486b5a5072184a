"""Pipelines of many classes: requests that run together give what each gives alone by plain diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.unit.pipelines.builders import flux1, flux2, image, qwen, sd, sound_and_mesh, video, wan
from tests.unit.pipelines.driver import counted, difference, four, load, together, without_merging


class Case(NamedTuple):
    build: Callable[[], Any]
    denoiser: str
    kind: str = "image"
    side: int | None = None  # pixels; None: the pipeline's own
    tolerance: float = 1e-5  # of results in 0..1; larger where the pipeline amplifies rounding
    merged: bool = True  # whether the denoiser's calls are


CASES = {
    "stable_diffusion": Case(sd.stable_diffusion, "unet"),
    "sd_image_to_image": Case(sd.sd_image_to_image, "unet", tolerance=3e-5),
    "sd_inpaint": Case(sd.sd_inpaint, "unet", tolerance=3e-5),
    "sd_controlnet": Case(sd.sd_controlnet, "unet", tolerance=3e-5),
    "sdxl": Case(sd.sdxl, "unet", tolerance=3e-5),
    "sd3": Case(sd.sd3, "transformer"),
    "flux": Case(flux1.flux, "transformer", side=64),
    "flux_image_to_image": Case(flux1.flux_image_to_image, "transformer", side=64),
    "flux_kontext": Case(flux1.flux_kontext, "transformer", side=64),
    "flux_controlnet": Case(flux1.flux_controlnet, "transformer", side=64),
    "flux2_klein": Case(flux2.flux2_klein, "transformer", side=64),
    "chroma": Case(flux1.chroma, "transformer", side=64),
    "qwen_image": Case(qwen.qwen_image, "transformer"),
    "qwen_image_to_image": Case(qwen.qwen_image_to_image, "transformer"),
    "qwen_inpaint": Case(qwen.qwen_inpaint, "transformer"),
    "qwen_controlnet": Case(qwen.qwen_controlnet, "transformer"),
    "z_image": Case(image.z_image, "transformer", side=64),
    "z_image_to_image": Case(image.z_image_to_image, "transformer", side=64),
    "pixart_sigma": Case(image.pixart_sigma, "transformer", tolerance=3e-4),
    "wan": Case(wan.wan, "transformer", "video", side=32),
    "wan_two_transformers": Case(wan.wan_two_transformers, "transformer", "video", side=32),
    "wan_image_to_video": Case(wan.wan_image_to_video, "transformer", "video", side=32),
    "ltx": Case(video.ltx, "transformer", "video", side=32),
    # With two rows diffusers pairs the temporal context of one with pixels of the other: merging would change results.
    "stable_video": Case(video.stable_video, "unet", "video", side=64, merged=False, tolerance=1e-4),
    "stable_audio": Case(sound_and_mesh.stable_audio, "transformer", "audio"),
}


@pytest.mark.parametrize("name", CASES)
def test_together_as_alone(name: str) -> None:
    """Four different requests equal plain diffusers within rounding, and bit for bit where nothing is merged.

    They differ in prompt, seed, steps and guidance, and take no more denoiser calls than the longest of them alone.
    """
    case = CASES[name]
    model = load(case.build(), side=case.side)
    requests = four(model)
    plain, alone = [], []
    for request in requests:
        with counted(model, case.denoiser) as calls:
            plain.append(model.plain(request))
        alone.append(calls.total())

    first = together(model, requests)  # some patterns of calls show up first here, and are verified
    with counted(model, case.denoiser) as calls:
        runs = together(model, requests)
    apart = without_merging(model, requests)

    for others in (first, runs):
        for run, expected in zip(others, plain, strict=True):
            assert run.error is None
            assert difference(run.result, expected) <= case.tolerance
    for run, expected in zip(apart, plain, strict=True):
        assert difference(run.result, expected) == 0.0
    assert difference(plain[0], plain[1]) > 100 * case.tolerance, "the requests are too alike to tell them apart"
    assert calls.total() <= (max(alone) if case.merged else sum(alone)), model.summary()
    assert bool(model.summary()["alone"]) is not case.merged
    assert model.read(runs[2].result).kind == case.kind


@pytest.mark.parametrize("name", ["stable_diffusion", "qwen_image"])
def test_joining_at_any_call(name: str) -> None:
    """Requests that join while others are at other calls of theirs are as alone, too."""
    case = CASES[name]
    model = load(case.build(), side=case.side)
    requests = four(model)
    plain = [model.plain(request) for request in requests]
    for apart in (1, 2, 3, 5):
        for run, expected in zip(together(model, requests, apart=apart), plain, strict=True):
            assert difference(run.result, expected) <= case.tolerance, apart
