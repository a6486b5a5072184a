"""Golden tests of what a row may have of its own: source images, LoRAs, ControlNets, long and weighted prompts.

All in ONE mixed, staggered batch, each against its plain diffusers pipeline run alone; then each with its feature
broken on purpose, which must miss by far.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.models import Adapters, StepModel, load_model
from calotype_worker.request import ControlInput
from calotype_worker.sampling import make_scheduler
from calotype_worker.sampling.samplers import SAMPLERS
from tests.models import (
    sample_image,
    write_kohya_lora,
    write_tiny_controlnet,
    write_tiny_embedding,
    write_tiny_lora,
    write_tiny_sd,
)
from tests.unit.test_engine_golden import TOLERANCE, levels, run_staggered

LONG = "a long story, told in more letters than one window holds. and then it goes on, and on"
MASK = np.zeros((64, 64), dtype=bool)
MASK[16:48, 24:56] = True


@dataclass(frozen=True)
class Files:
    """What the model is loaded with."""

    model: Path
    adapters: Adapters


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("adapters")
    first = write_tiny_lora(folder / "first.safetensors", seed=11)
    second = write_tiny_lora(folder / "second.safetensors", seed=12, text=True, rank=2)
    adapters = Adapters(
        loras={
            "first": first,
            "second": second,
            "kohya": write_kohya_lora(folder / "kohya.safetensors", second),
        },
        controls={name: str(write_tiny_controlnet(folder / name, seed=seed)) for name, seed in (("a", 21), ("b", 22))},
        embeddings={"<ring>": write_tiny_embedding(folder / "ring.safetensors", "<ring>", seed=31)},
    )
    return Files(model=write_tiny_sd(folder / "model"), adapters=adapters)


@pytest.fixture(scope="module")
def model(files: Files) -> StepModel:
    return load_model("tiny", source=str(files.model), adapters=files.adapters)  # type: ignore[return-value]


def make(name: str, **changes: Any) -> GenerationRequest:
    index = sum(map(ord, name))
    values = {
        "request_id": name,
        "prompt": f"image {index}"[:20],
        "negative_prompt": "blurry" if index % 2 else "",
        "width": 64,
        "height": 64,
        "num_inference_steps": (8, 11, 14)[index % 3],
        "guidance_scale": (1.0, 5.0, 3.0)[index // 3 % 3],
        "seed": index,
        "sampler": SamplerType.DDIM,
    }
    return GenerationRequest(**{**values, **changes})


SOURCE, OTHER = sample_image(1), sample_image(2)
IMAGE_TO_IMAGE = [
    make(f"i2i-{sampler.value}", init_image=SOURCE, strength=strength, sampler=sampler)
    for sampler, strength in zip(SAMPLERS, itertools.cycle((0.3, 0.5, 0.75, 0.9, 0.6, 0.8, 0.4)))
]
INPAINTING = [
    make(f"inpaint-{sampler.value}", init_image=SOURCE, mask=MASK, strength=strength, sampler=sampler)
    for sampler, strength in (
        (SamplerType.DDIM, 1.0),
        (SamplerType.EULER, 0.8),
        (SamplerType.HEUN, 0.6),
        (SamplerType.EULER_A, 1.0),
        (SamplerType.DPMPP_2M, 0.7),
        (SamplerType.PNDM, 0.5),
    )
]
LORAS = [
    make("lora-first", loras=(("first", 1.0),)),
    make("lora-second", loras=(("second", 0.5),), guidance_scale=4.0, negative_prompt="no"),
    make("lora-both", loras=(("second", 0.4), ("first", -0.5)), sampler=SamplerType.UNIPC),
    make("lora-kohya", loras=(("kohya", 0.5),), guidance_scale=4.0),
]
CONTROLS = [
    make("control-a", controls=(ControlInput(name="a", image=SOURCE),)),
    make("control-weak", controls=(ControlInput(name="a", image=OTHER, scale=0.4),), guidance_scale=4.0),
    make(
        "control-both",
        controls=(
            ControlInput(name="a", image=SOURCE, scale=0.8, start=0.2),
            ControlInput(name="b", image=OTHER, scale=0.6, end=0.5),
        ),
        sampler=SamplerType.EULER,
    ),
]
PROMPTS = [
    make("prompt-long", prompt=LONG, guidance_scale=4.0, negative_prompt="short"),
    make("prompt-weighted", prompt="a (red:1.5) ring, (blue:0.5) sky", guidance_scale=4.0),
    make("prompt-token", prompt="a <ring>", guidance_scale=4.0),
]
PLAIN = [make("plain", sampler=SamplerType.EULER), make("plain-too", guidance_scale=6.0)]
EVERYTHING = [*IMAGE_TO_IMAGE, *INPAINTING, *LORAS, *CONTROLS, *PROMPTS, *PLAIN]


class Plain:
    """Each request by the diffusers pipeline made for it."""

    def __init__(self, files: Files, model: StepModel) -> None:
        from diffusers import ControlNetModel, StableDiffusionPipeline

        self._files = files
        self._config = model.scheduler_config  # type: ignore[attr-defined]
        self._pipeline = StableDiffusionPipeline.from_pretrained(
            files.model, safety_checker=None, requires_safety_checker=False
        )
        self._pipeline.load_textual_inversion(str(files.adapters.embeddings["<ring>"]), token="<ring>")
        self._controls = {n: ControlNetModel.from_pretrained(f) for n, f in files.adapters.controls.items()}

    def make(self, request: GenerationRequest) -> np.ndarray:
        import diffusers

        arguments: dict[str, Any] = {
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "generator": torch.Generator().manual_seed(request.seed),
        }
        source: Any = request.init_image
        kind, parts = diffusers.StableDiffusionPipeline, dict(self._pipeline.components)
        if request.mask is not None:
            kind = diffusers.StableDiffusionInpaintPipeline
            arguments |= {"image": Image.fromarray(source), "mask_image": Image.fromarray(request.mask)}
            arguments |= {"strength": request.strength, "width": request.width, "height": request.height}
        elif request.init_image is not None:
            kind = diffusers.StableDiffusionImg2ImgPipeline
            arguments |= {"image": Image.fromarray(source), "strength": request.strength}
        elif request.controls:
            kind = diffusers.StableDiffusionControlNetPipeline
            arguments |= {
                "image": [Image.fromarray(c.image) for c in request.controls],
                "controlnet_conditioning_scale": [c.scale for c in request.controls],
                "control_guidance_start": [c.start for c in request.controls],
                "control_guidance_end": [c.end for c in request.controls],
            }
            parts["controlnet"] = [self._controls[c.name] for c in request.controls]
        pipeline = kind(**parts, requires_safety_checker=False)
        pipeline.scheduler = make_scheduler(request.sampler, self._config, request.num_inference_steps)
        pipeline.set_progress_bar_config(disable=True)
        for name, _ in request.loras:
            # diffusers 0.42 finds no text encoder layers in kohya's spelling with transformers 5; it is "second" again.
            file = self._files.adapters.loras["second" if name == "kohya" else name]
            pipeline.load_lora_weights(str(file), adapter_name=name)
        if request.loras:
            pipeline.set_adapters([n for n, _ in request.loras], [w for _, w in request.loras])
        try:
            made = np.asarray(pipeline(**self._texts(request), **arguments).images[0])
        finally:
            if request.loras:
                pipeline.unload_lora_weights()
        if request.mask is None:
            return made
        return np.where(request.mask[:, :, None], made, source)

    def _texts(self, request: GenerationRequest) -> dict[str, Any]:
        """Plain text, or compel's embeddings where a prompt is long or weighted."""
        if not request.request_id.startswith(("prompt-long", "prompt-weighted")):
            return {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
        from compel import Compel

        compel = Compel(self._pipeline.tokenizer, self._pipeline.text_encoder, truncate_long_prompts=False)
        written = request.prompt.replace("(red:1.5)", "(red)1.5").replace("(blue:0.5)", "(blue)0.5")
        embedded = [compel(written), compel(request.negative_prompt)]
        prompt, negative = compel.pad_conditioning_tensors_to_same_length(embedded)
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


@pytest.fixture(scope="module")
def references(files: Files, model: StepModel) -> dict[str, np.ndarray]:
    plain = Plain(files, model)
    return {request.request_id: plain.make(request) for request in EVERYTHING}


def differences(
    model: StepModel, requests: list[GenerationRequest], references: dict[str, np.ndarray], **settings: Any
) -> dict[str, float]:
    engine = Engine(model, EngineSettings(max_rows=24, **settings))
    engine.start()
    try:
        return {r.request_id: levels(r.image, references[r.request_id]) for r in run_staggered(engine, requests)}
    finally:
        engine.stop()


def test_everything_shares_one_batch_and_matches_plain_diffusers(
    model: StepModel, references: dict[str, np.ndarray]
) -> None:
    """Source images, masks, LoRAs, ControlNets, long prompts: no row notices what its neighbours have."""
    order = np.random.default_rng(0).permutation(len(EVERYTHING))
    found = differences(model, [EVERYTHING[index] for index in order], references)
    assert max(found.values()) <= TOLERANCE, {name: off for name, off in found.items() if off > TOLERANCE}


@pytest.mark.parametrize(
    ("requests", "broken"),
    [
        (IMAGE_TO_IMAGE, lambda r: {"init_image": OTHER}),
        (IMAGE_TO_IMAGE, lambda r: {"strength": r.strength - 0.2}),
        (INPAINTING, lambda r: {"init_image": OTHER}),
        (LORAS, lambda r: {"loras": ()}),
        (LORAS, lambda r: {"loras": tuple((name, weight + 0.5) for name, weight in r.loras)}),
        (CONTROLS, lambda r: {"controls": ()}),
        (CONTROLS, lambda r: {"controls": tuple(replace(c, image=c.image[::-1].copy()) for c in r.controls)}),
        (CONTROLS, lambda r: {"controls": tuple(replace(c, scale=c.scale * 0.5) for c in r.controls)}),
        (CONTROLS[2:], lambda r: {"controls": tuple(replace(c, start=0.0, end=1.0) for c in r.controls)}),
        (PROMPTS[1:2], lambda r: {"prompt": "a red ring, blue sky"}),
        (PROMPTS[:1], lambda r: {"prompt": LONG[:22]}),
        (PROMPTS[2:], lambda r: {"prompt": "a ring"}),
    ],
    ids=[
        "source",
        "strength",
        "kept",
        "lora",
        "lora weight",
        "control",
        "control image",
        "control scale",
        "control range",
        "weights",
        "long",
        "token",
    ],
)
def test_control_a_feature_that_did_nothing_is_caught(
    model: StepModel,
    references: dict[str, np.ndarray],
    requests: list[GenerationRequest],
    broken: Callable[[GenerationRequest], dict[str, Any]],
) -> None:
    """Leaving it out, or giving another's, changes every one of these images; late sources by least."""
    changed = differences(model, [replace(r, **broken(r)) for r in requests], references)
    assert min(changed.values()) > 2 * TOLERANCE, changed


def test_deterministic_mode_gives_the_same_bits_in_any_order(model: StepModel) -> None:
    """Whatever a row has of its own, and whatever its neighbours have."""
    chosen = [IMAGE_TO_IMAGE[1], INPAINTING[1], LORAS[0], LORAS[2], CONTROLS[1], PROMPTS[0], PROMPTS[1], PLAIN[0]]
    made: list[dict[str, bytes]] = []
    for seed in range(3):
        engine = Engine(model, EngineSettings(max_rows=8, deterministic=True))
        engine.start()
        order = np.random.default_rng(seed).permutation(len(chosen))
        try:
            results = run_staggered(engine, [chosen[index] for index in order])
        finally:
            engine.stop()
        made.append({result.request_id: result.image.tobytes() for result in results})
    assert made[0] == made[1] == made[2]


def test_networks_made_for_inpainting_and_distilled_ones_match(tmp_path: Path) -> None:
    """Nine input channels, and a guidance scale that the network reads itself, each in its mixed batch."""
    import diffusers

    wide = write_tiny_sd(tmp_path / "wide", seed=5, in_channels=9)
    distilled = write_tiny_sd(tmp_path / "distilled", seed=6, time_cond_proj_dim=32)
    cases = {
        wide: [*INPAINTING[:4], make("weak", init_image=OTHER, mask=~MASK, strength=0.4, guidance_scale=1.0)],
        distilled: [
            make("lcm", sampler=SamplerType.LCM, num_inference_steps=4, guidance_scale=8.0),
            make("turbo", sampler=SamplerType.EULER, num_inference_steps=1, guidance_scale=0.0),
            make("ddim", guidance_scale=3.0),
        ],
    }
    for folder, requests in cases.items():
        tiny = load_model("tiny", source=str(folder))
        parts = diffusers.StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, requires_safety_checker=False
        ).components
        plain = Plain.__new__(Plain)
        plain._config, plain._files, plain._controls = tiny.scheduler_config, None, {}  # type: ignore
        plain._pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        references = {request.request_id: plain.make(request) for request in requests}
        found = differences(tiny, requests, references)  # type: ignore[arg-type]
        assert max(found.values()) <= TOLERANCE, found
    scales = [replace(r, guidance_scale=r.guidance_scale + 2) for r in cases[distilled]]
    changed = differences(tiny, scales, references)  # type: ignore[arg-type]
    assert min(changed.values()) > 2 * TOLERANCE, "the network does not read its guidance scale"
