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

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.enums import Feature, SamplerType
from calotype_shared.schema.resolve import ResolvedConfig, resolve
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.models import Adapters, ModelPool, StepModel, load_model
from calotype_worker.models.base import Rows
from calotype_worker.request import ControlInput
from calotype_worker.sampling.samplers import SAMPLERS
from tests import family_models as tiny
from tests.models import sample_image
from tests.unit.test_engine_golden import TOLERANCE, levels, run_staggered

SOURCE, OUTLINE = sample_image(4), sample_image(8)
MASK = np.zeros((64, 64), dtype=bool)
MASK[16:48, 24:56] = True


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
    """Steps, samplers, guidance, prompts, two with a negative one, two from a source image."""
    made = []
    for index in range(6):
        sampler = family.samplers[index % len(family.samplers)]
        made.append(
            GenerationRequest(
                request_id=f"{index}-{sampler.value}",
                prompt=f"image {index}",
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
    """The same image by plain diffusers."""
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


def test_a_mixed_batch_gives_the_images_of_the_plain_pipeline(
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

    def resolved(prompt: str = "a", **fields: Any) -> ResolvedConfig:
        return resolve(GenerationConfig(prompt=prompt, model=card.name, **fields), {card.name: card})

    assert resolved().sampler in card.samplers
    if card.family != "sdxl":
        with pytest.raises(InvalidRequest, match=r"sampler='ddim'.*available: euler"):
            resolved(sampler="ddim")
        with pytest.raises(InvalidRequest, match=r"prompt=.*'\(red:1.3\)' is a prompt weight"):
            resolved("a (red:1.3) cat")
        resolved("a (red) cat at 3:15")
        with pytest.raises(InvalidRequest, match=r"width=72.*multiple of 16"):
            resolved(width=72, height=64)


def test_a_refiner_takes_over_the_unfinished_latents(tmp_path: Path) -> None:
    """As SDXL's two pipelines do by denoising_end and denoising_start; every sampler in one engine."""
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
            prompt=f"image {index}",
            negative_prompt="blurry" if index else "",
            width=64,
            height=64,
            num_inference_steps=10 + index % 7,
            guidance_scale=3.0,
            seed=index,
            sampler=sampler,
            refiner="refiner",
            refiner_start=(0.8, 0.6, 0.5)[index % 3],
        )
        for index, sampler in enumerate(SAMPLERS)
    ]
    engine = Engine(pool)
    engine.start()
    try:
        made = run_staggered(engine, wanted)
        [without] = run_staggered(engine, [replace(wanted[0], refiner=None)])
        for start, said in ((0.9999, "no step for the refiner"), (0.0001, "no step for the base model")):
            with pytest.raises(InvalidRequest, match=said):
                engine.submit(replace(wanted[0], request_id="none", refiner_start=start))
    finally:
        engine.stop()
    for request, result in zip(wanted, made, strict=True):
        generator = torch.Generator().manual_seed(request.seed)  # goes on where the first pipeline left it
        both: dict[str, Any] = {
            "generator": generator,
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
        ).images
        expected = refiner(**both, image=latents, denoising_start=request.refiner_start).images[0]
        assert levels(result.image, np.asarray(expected)) <= TOLERANCE
        # These evaluate more often than they step.
        if request.sampler not in (SamplerType.HEUN, SamplerType.PNDM, SamplerType.DPM2, SamplerType.DPM2_A):
            assert result.steps_taken == request.num_inference_steps
    assert levels(without.image, made[0].image) > 12, "the refiner did nothing"
    assert Feature.TEXT_TO_IMAGE not in pool.get("refiner").card.features


def adapted_requests(*, sdxl: bool) -> dict[str, GenerationRequest]:
    """Rows with a LoRA, a mask, both and neither; of SDXL also with a learned word and with a ControlNet."""
    painted: dict[str, Any] = {"init_image": SOURCE, "mask": MASK}
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "lora": {"loras": (("style", 0.7),), "negative_prompt": "blurry"},
        "mask": painted,
        "mask-late": {**painted, "strength": 0.6, "loras": (("style", 1.0),)},
    }
    if sdxl:
        changes["word"] = {"prompt": "a <ring> b"}
        changes["control"] = {"controls": (ControlInput(name="outline", image=OUTLINE, scale=0.8, end=0.6),)}
        changes["control-lora"] = {
            "controls": (ControlInput(name="outline", image=OUTLINE),),
            "loras": (("style", 0.5),),
        }
    return {
        name: replace(
            GenerationRequest(
                request_id=name,
                prompt=f"image {index}",
                width=64,
                height=64,
                num_inference_steps=(6, 9, 11)[index % 3],
                guidance_scale=(4.0, 1.0, 2.5)[index % 3],
                seed=index,
                sampler=SamplerType.EULER,
            ),
            **own,
        )
        for index, (name, own) in enumerate(changes.items())
    }


def adapted_alone(folder: Path, adapters: Adapters, model: StepModel, request: GenerationRequest) -> np.ndarray:
    """The same image by the plain pipeline for it, with only what this request has."""
    from safetensors.torch import load_file

    text_to_image = diffusers.DiffusionPipeline.from_pretrained(folder)
    for token, file in adapters.embeddings.items():
        vectors = load_file(file)
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            text_to_image.load_textual_inversion(
                vectors[key],
                token=token,
                tokenizer=getattr(text_to_image, f"tokenizer{number}"),
                text_encoder=getattr(text_to_image, f"text_encoder{number}"),
            )
    stem = type(text_to_image).__name__.removesuffix("Pipeline")
    parts = text_to_image.components
    arguments: dict[str, Any] = {}
    if "Flux" not in stem:
        arguments["negative_prompt"] = request.negative_prompt or None
    if request.mask is not None:
        stem += "Inpaint"
        arguments |= {
            "image": Image.fromarray(SOURCE),
            "mask_image": Image.fromarray(MASK.astype(np.uint8) * 255),
            "strength": request.strength,
        }
    for control in request.controls:
        stem += "ControlNet"
        parts = {**parts, "controlnet": diffusers.ControlNetModel.from_pretrained(adapters.controls[control.name])}
        arguments |= {
            "image": Image.fromarray(control.image),
            "controlnet_conditioning_scale": control.scale,
            "control_guidance_end": control.end,
        }
    pipeline = getattr(diffusers, f"{stem}Pipeline")(**parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = model.make_scheduler(request)
    for name, weight in request.loras:
        pipeline.load_lora_weights(str(adapters.loras[name]), adapter_name=name)
        pipeline.set_adapters([name], [weight])
    arguments |= {"output_type": "latent"} if stem == "StableDiffusion3Inpaint" else {}
    [made] = pipeline(
        request.prompt,
        width=64,
        height=64,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        **arguments,
    ).images
    # diffusers 0.42's StableDiffusion3InpaintPipeline decodes without the autoencoder's shift; its latents are right.
    image = model.decode(made.unsqueeze(0))[0] if isinstance(made, torch.Tensor) else np.asarray(made)
    return image if request.mask is None else np.where(MASK[:, :, None], image, SOURCE)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux-dev"])
def test_adapters_and_masks_share_a_batch_and_match(family: str, tmp_path: Path) -> None:
    """Each row its own LoRA, ControlNet, word or mask, and each of them changes the image."""
    pipeline = FAMILIES[family].make()
    folder = tiny.write(pipeline, tmp_path / "model")
    adapters = Adapters(loras={"style": tiny.write_lora(pipeline, tmp_path / "style.safetensors")})
    if family == "sdxl":
        adapters = replace(
            adapters,
            embeddings={"<ring>": tiny.write_embedding(tmp_path / "ring.safetensors")},
            controls={"outline": str(tiny.write_controlnet(pipeline, tmp_path / "outline"))},
        )
    model: Any = load_model(family, source=str(folder), adapters=adapters)
    wanted = list(adapted_requests(sdxl=family == "sdxl").values())
    references = [adapted_alone(folder, adapters, model, request) for request in wanted]
    found = worst(model, wanted, references)
    assert max(found) <= TOLERANCE, dict(zip([r.request_id for r in wanted], found, strict=True))
    without = [replace(r, loras=(), controls=(), mask=None, init_image=None, prompt="a") for r in wanted[1:]]
    assert min(worst(model, without, references[1:])) > 2 * TOLERANCE


def test_networks_that_read_their_guidance_match(tmp_path: Path) -> None:
    """SDXL distilled for few steps (LCM): another scale is another image, and no row is doubled for it."""
    pipeline = tiny.tiny_sdxl(time_cond_proj_dim=32)
    with torch.no_grad():
        pipeline.unet.time_embedding.cond_proj.weight.mul_(10)
    model: Any = load_model("lcm", source=str(tiny.write(pipeline, tmp_path / "lcm")))
    family = replace(FAMILIES["sdxl"], samplers=(SamplerType.LCM, SamplerType.EULER))
    wanted = [replace(r, negative_prompt="", num_inference_steps=4) for r in requests(family)[:4]]
    references = [alone(pipeline, family, model, request) for request in wanted]
    assert max(worst(model, wanted, references)) <= TOLERANCE
    assert min(worst(model, [replace(r, guidance_scale=20.0) for r in wanted], references)) > 2 * TOLERANCE
    assert not model.card.features & {Feature.LORA, Feature.CONTROLNET}


def test_noise_levels_that_shift_with_the_size_match(tmp_path: Path) -> None:
    """Heun cannot shift them, so such a model has only Euler."""
    folder = tiny.write(tiny.tiny_sd3(dynamic=True), tmp_path / "dynamic")
    model: Any = load_model("dynamic", source=str(folder))
    assert model.card.samplers == ("euler",)
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    wanted = [
        replace(request, width=width, height=64, sampler=SamplerType.EULER)
        for request, width in zip(requests(FAMILIES["sd3"])[:2], (64, 112), strict=True)
    ]
    references = [
        np.asarray(
            plain(
                request.prompt,
                negative_prompt=request.negative_prompt or None,
                width=request.width,
                height=request.height,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator().manual_seed(request.seed),
            ).images[0]
        )
        for request in wanted
    ]
    assert max(worst(model, wanted, references)) <= TOLERANCE
    with pytest.raises(InvalidRequest, match=r"sampler='heun'.*use one of: euler"):
        model.make_scheduler(replace(wanted[0], sampler=SamplerType.HEUN))


@pytest.mark.parametrize("adapters", [Adapters(embeddings={"<x>": Path("x")}), Adapters(controls={"c": "c"})])
@pytest.mark.parametrize("make", [tiny.tiny_sd3, tiny.tiny_flux])
def test_what_a_family_would_not_read_is_refused(make: Callable[[], Any], adapters: Adapters, tmp_path: Path) -> None:
    """Textual inversions and ControlNets of Stable Diffusion 3 and Flux: when the model is loaded, not in silence."""
    folder = tiny.write(make(), tmp_path / "model")
    with pytest.raises(
        ModelLoadError, match=r"supports LoRAs, but no textual inversions or ControlNets; leave them out"
    ):
        load_model("model", source=str(folder), adapters=adapters)
