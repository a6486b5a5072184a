"""Golden tests of SDXL, its refiner, Stable Diffusion 3 and Flux: mixed batches against each plain pipeline alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from calotype_shared.config import Feature, GenerationConfig, SamplerType
from calotype_shared.errors import InvalidRequest
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.models import ModelPool, StepModel, load_model
from calotype_worker.models.base import Rows
from tests import family_models as tiny
from tests.models import picture
from tests.unit.test_engine_golden import TOLERANCE, levels, run_staggered

SOURCE = picture(4)


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    image_to_image: type[Any]
    samplers: tuple[SamplerType, ...]


FAMILIES = {
    "sdxl": Family(
        tiny.tiny_sdxl,
        diffusers.StableDiffusionXLImg2ImgPipeline,
        (SamplerType.EULER, SamplerType.DDIM, SamplerType.DPMPP_2M_KARRAS, SamplerType.EULER_A),
    ),
    "sd3": Family(tiny.tiny_sd3, diffusers.StableDiffusion3Img2ImgPipeline, (SamplerType.EULER, SamplerType.HEUN)),
    "sd3-without-t5": Family(
        lambda: tiny.tiny_sd3(t5=False), diffusers.StableDiffusion3Img2ImgPipeline, (SamplerType.EULER,)
    ),
    "flux-dev": Family(tiny.tiny_flux, diffusers.FluxImg2ImgPipeline, (SamplerType.EULER,)),
    "flux-schnell": Family(lambda: tiny.tiny_flux(guidance=False), diffusers.FluxImg2ImgPipeline, (SamplerType.EULER,)),
}


def requests(family: Family) -> list[GenerationRequest]:
    """Steps, samplers, guidance, prompts, two with a negative one, two from a source picture."""
    made = []
    for index in range(6):
        sampler = family.samplers[index % len(family.samplers)]
        made.append(
            GenerationRequest(
                request_id=f"{index}-{sampler.value}",
                prompt=f"picture {index}",
                negative_prompt="blurry" if index % 2 else "",
                width=64,
                height=64,
                num_inference_steps=(6, 9, 11)[index % 3],
                guidance_scale=(1.0, 4.0, 2.5)[(index + index // 3) % 3],
                seed=index,
                sampler=sampler,
                init_image=SOURCE if index > 3 else None,
                strength=0.6 if index > 3 else 1.0,
            )
        )
    return made


def alone(pipeline: Any, family: Family, model: StepModel, request: GenerationRequest) -> np.ndarray:
    """The same picture by plain diffusers."""
    kind = family.image_to_image if request.init_image is not None else type(pipeline)
    own = kind(**pipeline.components)
    own.set_progress_bar_config(disable=True)
    own.scheduler = model.make_scheduler(request)
    if hasattr(own, "default_sample_size") and "Flux" in kind.__name__:
        own.default_sample_size = 8
    arguments: dict[str, Any] = {"width": request.width, "height": request.height}
    if request.init_image is not None:
        arguments = {"image": Image.fromarray(request.init_image), "strength": request.strength}
    if "Flux" not in kind.__name__:
        arguments["negative_prompt"] = request.negative_prompt or None
    elif request.init_image is not None:
        arguments |= {"width": request.width, "height": request.height}
    image = own(
        request.prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **arguments,
    ).images[0]
    return np.asarray(image)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Any, StepModel]:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("families") / request.param
    pipeline = family.make()
    tiny.write(pipeline, folder)
    (folder / "calotype.json").write_text('{"native_sizes": [[64, 64]]}')
    # Loaded from the folder too: T5's tokenizer comes back from a file with other habits.
    absent = {name: None for name, part in pipeline.components.items() if part is None}
    pipeline = type(pipeline).from_pretrained(folder, **absent)
    return family, pipeline, load_model(request.param, source=str(folder))  # type: ignore[return-value]


def worst(model: StepModel, wanted: list[GenerationRequest], references: list[np.ndarray]) -> list[float]:
    engine = Engine(model, EngineSettings(max_rows=16))
    engine.start()
    try:
        return [levels(made.image, own) for made, own in zip(run_staggered(engine, wanted), references, strict=True)]
    finally:
        engine.stop()


def test_a_mixed_batch_gives_the_pictures_of_the_plain_pipeline(
    loaded: tuple[Family, Any, StepModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with timesteps, pooled text or sizes swapped between rows it does not."""
    family, pipeline, model = loaded
    wanted = requests(family)
    references = [alone(pipeline, family, model, request) for request in wanted]
    found = worst(model, wanted, references)
    assert max(found) <= TOLERANCE, dict(zip([r.request_id for r in wanted], found, strict=True))

    predict = model.predict
    for name in ("timesteps", *(set(model.row_inputs(wanted[0], negative=False)) | {"text", "pooled"})):

        def swapped(rows: Rows, name: str = name) -> torch.Tensor:
            if name == "timesteps":
                return predict(replace(rows, timesteps=rows.timesteps[:1].expand(len(rows.timesteps))))
            value = rows.conditioning[name]
            other = value * 2 + 50 if name == "time_ids" else value.roll(1, 0) if len(value) > 1 else value + 1
            return predict(replace(rows, conditioning={**rows.conditioning, name: other}))

        monkeypatch.setattr(model, "predict", swapped)
        assert max(worst(model, wanted, references)) > 2 * TOLERANCE, f"swapped {name} went unnoticed"
        monkeypatch.undo()


def test_a_card_says_what_the_family_can_do(loaded: tuple[Family, Any, StepModel]) -> None:
    """Its samplers, its own first; what it cannot do is refused at submission, with the reason."""
    family, _, model = loaded
    card = model.card
    assert card.samplers[0] == "euler"
    assert {sampler.value for sampler in family.samplers} <= set(card.samplers)
    assert {Feature.TEXT_TO_IMAGE, Feature.IMAGE_TO_IMAGE} <= card.features
    config = GenerationConfig(prompt="a", model=card.name)
    assert config.resolved(card).sampler in card.samplers
    if card.family != "sdxl":
        with pytest.raises(InvalidRequest, match=r"sampler='ddim'.*it has: euler"):
            GenerationConfig(prompt="a", sampler="ddim", model=card.name).resolved(card)
        with pytest.raises(InvalidRequest, match=r"prompt=.*'\(red:1.3\)' is a prompt weight"):
            GenerationConfig(prompt="a (red:1.3) cat", model=card.name).resolved(card)
        GenerationConfig(prompt="a (red) cat at 3:15", model=card.name).resolved(card)
        with pytest.raises(InvalidRequest, match=r"width=72.*multiple of 16"):
            GenerationConfig(prompt="a", width=72, height=64, model=card.name).resolved(card)


def test_a_refiner_takes_over_the_unfinished_latents(tmp_path: Path) -> None:
    """As SDXL's two pipelines do by denoising_end and denoising_start; several hand-overs in one engine."""
    base, refiner = tiny.tiny_sdxl(), tiny.tiny_refiner()
    pool = ModelPool(
        [
            load_model("base", source=str(tiny.write(base, tmp_path / "base"))),
            load_model("refiner", source=str(tiny.write(refiner, tmp_path / "refiner"))),
        ]
    )
    wanted = [
        GenerationRequest(
            request_id=str(index),
            prompt=f"picture {index}",
            negative_prompt="blurry" if index else "",
            width=64,
            height=64,
            num_inference_steps=10 + index,
            guidance_scale=3.0,
            seed=index,
            sampler=sampler,
            refiner="refiner",
            refiner_start=start,
        )
        for index, (sampler, start) in enumerate(
            [(SamplerType.EULER, 0.8), (SamplerType.DDIM, 0.6), (SamplerType.EULER, 0.5)]
        )
    ]
    engine = Engine(pool)
    engine.start()
    try:
        made = run_staggered(engine, wanted)
        [without] = run_staggered(engine, [replace(wanted[0], refiner=None)])
        for start, said in ((0.9999, "no step to it"), (0.0001, "no step to the model before it")):
            with pytest.raises(InvalidRequest, match=said):
                engine.submit(replace(wanted[0], request_id="none", refiner_start=start))
    finally:
        engine.stop()
    for request, result in zip(wanted, made, strict=True):
        both: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt or None,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
        }
        base.scheduler = pool.steppable("base").make_scheduler(request)
        refiner.scheduler = pool.steppable("refiner").make_scheduler(request)
        for pipeline in (base, refiner):
            pipeline.set_progress_bar_config(disable=True)
        latents = base(
            **both,
            width=64,
            height=64,
            denoising_end=request.refiner_start,
            output_type="latent",
            generator=torch.Generator().manual_seed(request.seed),
        ).images
        expected = refiner(**both, image=latents, denoising_start=request.refiner_start).images[0]
        assert levels(result.image, np.asarray(expected)) <= TOLERANCE
        assert result.steps_taken == request.num_inference_steps
    assert levels(without.image, made[0].image) > 12, "the refiner did nothing"
    assert Feature.TEXT_TO_IMAGE not in pool.get("refiner").card.features
