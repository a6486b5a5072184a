"""Pipelines of many classes: requests that run together give what each gives alone by plain diffusers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import pytest

from tests.unit.pipelines.builders import (
    cascade,
    flux1,
    flux2,
    hunyuan,
    image,
    modular,
    qwen,
    sd,
    sound_and_mesh,
    video,
    wan,
)
from tests.unit.pipelines.driver import counted, difference, four, load, together, without_merging

_KONTEXT = "diffusers.pipelines.flux.pipeline_flux_kontext"
_EDIT, _EDIT_PLUS = (f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{kind}" for kind in ("edit", "edit_plus"))
_SANA = "diffusers.pipelines.sana.pipeline_sana"


class Case(NamedTuple):
    build: Callable[[], Any]
    denoiser: str
    kind: str = "image"
    side: int | None = None  # pixels; None: the pipeline's own
    tolerance: float = 3e-5  # of results in 0..1; larger where the pipeline amplifies rounding
    alone: Collection[str] = ()  # networks whose calls are not merged
    parameters: Mapping[str, Any] = {}
    small: Mapping[str, Any] = {}  # constants of diffusers that would make images of a megapixel


CASES = {
    "stable_diffusion": Case(sd.stable_diffusion, "unet"),
    "sd_image_to_image": Case(sd.sd_image_to_image, "unet"),
    "sd_inpaint": Case(sd.sd_inpaint, "unet"),
    "sd_controlnet": Case(sd.sd_controlnet, "unet"),
    # Perturbed attention replaces processors of the shared network while it runs.
    "sd_perturbed_attention": Case(sd.sd_perturbed_attention, "unet", alone={"unet"}),
    "sdxl": Case(sd.sdxl, "unet"),
    "sdxl_half": Case(sd.sdxl_half, "unet"),
    "sd3": Case(sd.sd3, "transformer"),
    "flux": Case(flux1.flux, "transformer", side=64),
    "flux_image_to_image": Case(flux1.flux_image_to_image, "transformer", side=64),
    "flux_kontext": Case(
        flux1.flux_kontext,
        "transformer",
        side=64,
        small={f"{_KONTEXT}.PREFERRED_KONTEXT_RESOLUTIONS": [(64, 64)]},
    ),
    "flux_controlnet": Case(flux1.flux_controlnet, "transformer", side=64),
    "flux2": Case(flux2.flux2, "transformer", side=64),
    "flux2_klein": Case(flux2.flux2_klein, "transformer", side=64),
    "chroma": Case(flux1.chroma, "transformer", side=64),
    "qwen_image": Case(qwen.qwen_image, "transformer"),
    "qwen_image_to_image": Case(qwen.qwen_image_to_image, "transformer"),
    "qwen_inpaint": Case(qwen.qwen_inpaint, "transformer"),
    "qwen_edit": Case(
        qwen.qwen_edit,
        "transformer",
        small={f"{_EDIT}.calculate_dimensions": lambda area, ratio: (64, 64, None)},
    ),
    "qwen_edit_plus": Case(
        qwen.qwen_edit_plus, "transformer", small={f"{_EDIT_PLUS}.calculate_dimensions": lambda area, ratio: (64, 64)}
    ),
    "qwen_controlnet": Case(qwen.qwen_controlnet, "transformer"),
    "z_image": Case(image.z_image, "transformer", side=64),
    "z_image_to_image": Case(image.z_image_to_image, "transformer", side=64),
    "krea2": Case(image.krea2, "transformer", side=64),
    "ernie_image": Case(image.ernie_image, "transformer", side=64),
    "sana": Case(image.sana, "transformer", side=64, small={f"{_SANA}.ASPECT_RATIO_512_BIN": {"1.0": [64, 64]}}),
    "pixart_sigma": Case(image.pixart_sigma, "transformer", tolerance=3e-4),
    "dit": Case(image.dit, "transformer", parameters={"class_labels": [7]}),
    "hidream": Case(image.hidream, "transformer"),
    # It averages the text over its length, so prompts of different lengths cannot be padded to one.
    "kandinsky3": Case(cascade.kandinsky3, "unet", side=64, alone={"unet"}),
    "stable_cascade": Case(
        cascade.stable_cascade, "prior_prior", side=128, parameters={"prior_num_inference_steps": 3}
    ),
    "wan": Case(wan.wan, "transformer", "video", side=32),
    "wan_two_transformers": Case(wan.wan_two_transformers, "transformer", "video", side=32),
    "wan_image_to_video": Case(wan.wan_image_to_video, "transformer", "video", side=32),
    "ltx": Case(video.ltx, "transformer", "video", side=32),
    "ltx2": Case(video.ltx2, "transformer", "video", side=32),
    "hunyuan_video": Case(hunyuan.hunyuan_video, "transformer", "video", side=32),
    # Its autoencoder takes no batch, nor does that of plain diffusers.
    "hunyuan_video_15": Case(hunyuan.hunyuan_video_15, "transformer", "video", side=32, alone={"vae"}),
    "animatediff_controlnet": Case(video.animatediff_controlnet, "unet", "video", tolerance=4e-5),
    # With two rows diffusers pairs the temporal context of one with pixels of the other: merging would change results.
    "stable_video": Case(video.stable_video, "unet", "video", side=64, alone={"unet"}, tolerance=1e-4),
    "stable_audio": Case(sound_and_mesh.stable_audio, "transformer", "audio"),
    "modular_flux": Case(modular.modular_flux, "transformer", side=64),
    "modular_sdxl": Case(modular.modular_sdxl, "unet"),
    "modular_qwen": Case(modular.modular_qwen, "transformer", side=64),
}


# One of each kind of denoiser, input and output; `make test-slow` tries all.
FAST = {
    *("stable_diffusion", "sd_perturbed_attention", "sdxl_half", "flux", "flux_kontext", "qwen_image", "dit"),
    *("wan", "stable_audio", "modular_flux"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES])
def test_together_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four different requests equal plain diffusers within rounding, and bit for bit where nothing is merged.

    They differ in prompt, seed, steps and guidance, and take no more denoiser calls than the longest of them alone.
    """
    case = CASES[name]
    for constant, value in case.small.items():
        monkeypatch.setattr(constant, value)
    model = load(case.build(), side=case.side)
    requests = four(model, parameters=case.parameters)
    plain, alone = [], []
    for request in requests:
        with counted(model, case.denoiser) as calls:
            plain.append(model.plain(request))
        alone.append(calls.total())

    first = together(model, requests)  # some patterns of calls show up first here, and are verified
    with counted(model, case.denoiser) as calls:
        runs = together(model, requests)
    apart = without_merging(model, requests[:2])

    for others in (first, runs):
        for run, expected in zip(others, plain, strict=True):
            assert run.error is None
            assert difference(run.result, expected) <= case.tolerance
    for run, expected in zip(apart, plain, strict=False):
        assert difference(run.result, expected) == 0.0
    assert difference(plain[0], plain[1]) > 100 * case.tolerance, "the requests are too alike to tell them apart"
    assert calls.total() <= (sum(alone) if case.denoiser in case.alone else max(alone)), model.summary()
    if model.summary()["merged"]:
        assert {reason.partition(":")[0] for reason in model.summary()["alone"]} == set(case.alone)
    else:
        assert model.changes.startswith(case.denoiser)
        assert case.denoiser in case.alone
    assert model.read(runs[2].result).kind == case.kind


@pytest.mark.parametrize("name", ["stable_diffusion", pytest.param("qwen_image", marks=pytest.mark.slow)])
def test_joining_at_any_call(name: str) -> None:
    """Requests that join while others are at other calls of theirs are as alone, too."""
    case = CASES[name]
    model = load(case.build(), side=case.side)
    requests = four(model)
    plain = [model.plain(request) for request in requests]
    for apart in (1, 2, 3, 5):
        for run, expected in zip(together(model, requests, apart=apart), plain, strict=True):
            assert difference(run.result, expected) <= case.tolerance, apart
