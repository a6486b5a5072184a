"""LoRAs, ControlNets and textual inversions of pipelines: each request has its own, in calls that are merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.resolve import resolve
from calotype_worker.models import load_model
from calotype_worker.models.clip_text import ClipText
from calotype_worker.models.latent import Adapters
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.request import ControlInput, GenerationRequest
from tests.family_models import write_embedding
from tests.models import write_tiny_embedding
from tests.unit.pipelines.builders import flux1, image, qwen, sd, wan
from tests.unit.pipelines.driver import counted, difference, four, load, together, without_merging
from tests.video_and_mesh_models import tiny_animatediff

# Both, one, the other, none: what four requests use. The third takes the most steps.
LORAS = ((("first", 0.8), ("second", -0.5)), (("first", 0.6),), (("second", 1.2),), ())
LONGEST = 2


class Case(NamedTuple):
    build: Callable[[], Any]
    parts: tuple[str, ...]  # networks that the first LoRA changes; the second changes only the first of them
    side: int | None = None
    merged: bool = True


CASES = {
    "flux": Case(flux1.flux, ("transformer", "text_encoder"), 64),
    "sdxl": Case(sd.sdxl, ("unet", "text_encoder", "text_encoder_2")),
    # The captions of all rows go end to end through one layer of the network, so no row's weight can be applied there.
    "z_image": Case(image.z_image, ("transformer",), 64, merged=False),
    "animatediff": Case(tiny_animatediff, ("unet",)),  # frames are folded into the rows, or cells of a frame are
    "qwen_image": Case(qwen.qwen_image, ("transformer",)),
    "wan": Case(wan.wan, ("transformer",), 32),
}


def write_lora(pipeline: Any, file: Path, *, seed: int, rank: int, parts: Sequence[str]) -> Path:
    """A LoRA in diffusers' spelling, for all linear layers of these networks; of a U-Net, for those of its attention.

    It changes the pipeline.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(seed)
    layers: dict[str, Any] = {}
    for part in parts:
        module = getattr(pipeline, part)
        linear = [name for name, own in module.named_modules() if isinstance(own, torch.nn.Linear)]
        targets = [name for name in linear if part != "unet" or "attn" in name]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
        module.add_adapter(config, adapter_name=file.stem)
        for name, weight in module.named_parameters():
            if f".{file.stem}." in name:
                torch.nn.init.normal_(weight, std=0.2)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module, adapter_name=file.stem)
        layers[f"{part}_lora_adapter_metadata"] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    pipeline.save_lora_weights(file.parent, weight_name=file.name, safe_serialization=True, **layers)
    return file


def write_two(case: Case, folder: Path) -> dict[str, Path]:
    return {
        "first": write_lora(case.build(), folder / "first.safetensors", seed=1, rank=4, parts=case.parts),
        "second": write_lora(case.build(), folder / "second.safetensors", seed=2, rank=2, parts=case.parts[:1]),
    }


def plain_results(
    pipeline: Any, model: PipelineModel, files: dict[str, Path], requests: Sequence[GenerationRequest]
) -> list[Any]:
    """What diffusers makes of each request with `set_adapters`."""
    pipeline.set_progress_bar_config(disable=True)
    for name, file in files.items():
        pipeline.load_lora_weights(str(file), adapter_name=name)
    results = []
    for request in requests:
        if request.loras:
            pipeline.enable_lora()
            pipeline.set_adapters([name for name, _ in request.loras], [weight for _, weight in request.loras])
        else:
            pipeline.disable_lora()
        torch.manual_seed(request.seed)
        with torch.no_grad():
            results.append(pipeline(**model.arguments.of(request, model="")))
    return results


@pytest.mark.parametrize(
    "name", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "flux")]
)
def test_loras(name: str, tmp_path: Path) -> None:
    """Requests with two LoRAs, either or none share calls, and each equals plain diffusers with `set_adapters`."""
    case = CASES[name]
    files = write_two(case, tmp_path)
    model = load(case.build(), side=case.side, adapters=Adapters(loras=files))
    requests = [replace(r, loras=loras) for r, loras in zip(four(model), LORAS, strict=True)]
    expected = plain_results(case.build(), model, files, requests)
    with counted(model, case.parts[0]) as alone:
        plain = model.plain(requests[LONGEST])

    together(model, requests)  # verifies calls with different LoRAs, which start-up does not rehearse
    with counted(model, case.parts[0]) as calls:
        runs = together(model, requests)
    apart = without_merging(model, requests)

    for run, result in zip(runs, expected, strict=True):
        assert run.error is None
        assert difference(run.result, result) <= 3e-5
    for run, result in zip(apart, expected, strict=True):
        assert difference(run.result, result) <= 1e-6
    assert difference(plain, expected[LONGEST]) <= 1e-6
    without = model.plain(replace(requests[LONGEST], loras=()))
    assert difference(without, expected[LONGEST]) > 1e-2, "the LoRAs change too little to be seen"
    assert (calls.total() <= alone.total()) is case.merged, model.summary()


def test_loras_on_the_card(tmp_path: Path) -> None:
    """The card lists them, so that an unknown one is refused at submission. They are loaded again when evicted."""
    case = CASES["flux"]
    files = write_two(case, tmp_path)
    model = load(case.build(), side=64, adapters=Adapters(loras=files, lora_capacity=1))
    cards = {"tiny": model.card}
    config = {"model": "tiny", "prompt": "a star", "loras": [{"name": "first", "weight": 0.5}]}
    assert resolve(GenerationConfig.parse(config), cards).lora_names == ("first",)
    with pytest.raises(InvalidRequest, match=r"third.*available: first, second"):
        resolve(GenerationConfig.parse({**config, "loras": [{"name": "third"}]}), cards)

    requests = [replace(r, loras=loras) for r, loras in zip(four(model)[:2], LORAS[1:], strict=False)]
    roomy = load(case.build(), side=64, adapters=Adapters(loras=files))
    for run, request in zip(together(model, requests), requests, strict=True):
        assert difference(run.result, roomy.plain(request)) <= 3e-5
    assert len(model.loras.loaded) == 1
    assert len(roomy.loras.loaded) == 2


def test_refused_lora_files(tmp_path: Path) -> None:
    """A file is refused at start, with the names of the entries that would not be used."""
    case = CASES["flux"]
    good = load_file(write_two(case, tmp_path)["second"])
    left = {
        "another network's": {"prior.attn.to_q.lora_A.weight": torch.ones(2, 2)},
        "another kind": {"transformer.x_embedder.oft_blocks": torch.ones(2, 2)},
        "a missing layer": {
            f"transformer.transformer_blocks.9.attn.to_q.lora_{side}.weight": torch.ones(shape)
            for side, shape in (("A", (2, 32)), ("B", (32, 2)))
        },
    }
    for reason, entries in left.items():
        file = tmp_path / "bad.safetensors"
        save_file({**good, **entries}, file)
        named = next(iter(entries)).split(".lora_")[0]
        with pytest.raises(ModelLoadError, match=named.replace(".", r"\.")):
            load(case.build(), side=64, adapters=Adapters(loras={"bad": file}))
        assert reason


def test_class_without_adapters(tmp_path: Path) -> None:
    file = {"any": tmp_path / "any.safetensors"}
    with pytest.raises(ModelLoadError, match="PixArtSigmaPipeline takes no LoRAs"):
        load(image.pixart_sigma(), adapters=Adapters(loras=file))
    with pytest.raises(ModelLoadError, match="PixArtSigmaPipeline takes no textual inversions"):
        load(image.pixart_sigma(), adapters=Adapters(embeddings=file))


@pytest.mark.parametrize("name", [pytest.param("stable_diffusion", marks=pytest.mark.slow), "sdxl"])
def test_textual_inversions(name: str, tmp_path: Path) -> None:
    """A registered token is a word of prompts, in calls that are merged with others', as in plain diffusers."""
    build = getattr(sd, name)
    file = tmp_path / "lime.safetensors"
    (write_embedding(file) if name == "sdxl" else write_tiny_embedding(file, "<lime>", seed=1))
    model = load(build(), adapters=Adapters(embeddings={"<lime>": file}))
    assert model.card.embeddings == ("<lime>",)
    requests = [replace(r, prompt=p) for r, p in zip(four(model), ("a <lime> star", "a star"), strict=False)]

    plain = build()
    plain.set_progress_bar_config(disable=True)
    vectors = load_file(file)
    if name == "sdxl":
        plain.load_textual_inversion(vectors["clip_l"], token="<lime>")
        plain.load_textual_inversion(
            vectors["clip_g"], token="<lime>", tokenizer=plain.tokenizer_2, text_encoder=plain.text_encoder_2
        )
    else:
        plain.load_textual_inversion(str(file), token="<lime>", use_safetensors=True)
    for run, request in zip(together(model, requests), requests, strict=True):
        torch.manual_seed(request.seed)
        expected = plain(**model.arguments.of(request, model=""))
        assert run.error is None
        assert difference(run.result, expected) <= 3e-5
    without = model.plain(replace(requests[0], prompt="a lime star"))
    assert difference(model.plain(requests[0]), without) > 1e-2, "the token changes too little to be seen"


WEIGHTED = ("a (red:1.4) star", "(a:0.6) [blue] star", r"a \(red\) star", "a red star")


@pytest.mark.parametrize("name", [pytest.param("sd_controlnet", marks=pytest.mark.slow), "sdxl"])
def test_prompt_weights(name: str) -> None:
    """Weighted prompts are embedded as for step models, and all requests share the denoiser's calls."""
    build = getattr(sd, name)
    model = load(build())
    assert "prompt_weights" in model.card.features
    requests = [replace(r, prompt=prompt) for r, prompt in zip(four(model), WEIGHTED, strict=True)]
    requests[1] = replace(requests[1], negative_prompt="(gray:1.2)")

    plain = build()
    plain.set_progress_bar_config(disable=True)
    both = name == "sdxl"
    texts = [ClipText(plain.tokenizer, plain.text_encoder, penultimate=both)]
    if both:
        texts.append(ClipText(plain.tokenizer_2, plain.text_encoder_2, penultimate=True))

    def embedded(prompt: str, negative: str = "") -> dict[str, torch.Tensor]:
        start = f"{negative}prompt_embeds"
        own = {start: torch.cat([text.encode(prompt)[: text.window_tokens] for text in texts], dim=-1).unsqueeze(0)}
        if both:
            own[f"{negative}pooled_prompt_embeds"] = plain.text_encoder_2(texts[1].tokens(prompt))[0]
        return own

    together(model, requests)
    with counted(model, "unet") as calls:
        runs = together(model, requests)
    assert calls.total() <= requests[LONGEST].num_inference_steps + 1, model.summary()  # PNDM takes one more
    for run, request in zip(runs, requests, strict=True):
        arguments = model.arguments.of(request, model="")
        with torch.no_grad():
            if request.prompt in WEIGHTED[:2]:
                arguments = {**arguments, "prompt": None, **embedded(request.prompt)}
            else:
                arguments["prompt"] = request.prompt.replace("\\", "")
            if request.negative_prompt:
                arguments = {**arguments, "negative_prompt": None, **embedded(request.negative_prompt, "negative_")}
            torch.manual_seed(request.seed)
            expected = plain(**arguments)
        assert run.error is None
        assert difference(run.result, expected) <= 3e-5
    bare = model.plain(replace(requests[0], prompt="a red star"))
    assert difference(model.plain(requests[0]), bare) > 1e-3, "the weights change too little to be seen"


class ControlCase(NamedTuple):
    build: Callable[[], Any]  # the base, without a ControlNet
    control: Callable[[int], Any]
    pipeline: str
    image: str  # the control image's argument
    denoiser: str


CONTROL_CASES = {
    "sdxl": ControlCase(sd.sdxl, sd.sdxl_control, "StableDiffusionXLControlNetPipeline", "image", "unet"),
    "flux": ControlCase(flux1.flux, flux1.flux_control, "FluxControlNetPipeline", "control_image", "transformer"),
}
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)

# What four jobs ask for: the request's fields, the ControlNet, and diffusers' arguments.
CONTROLS: tuple[tuple[dict[str, Any], str, dict[str, float]], ...] = (
    (
        {"controls": (ControlInput(name="edges", image=IMAGE, scale=0.5),)},
        "edges",
        {"controlnet_conditioning_scale": 0.5},
    ),
    (
        {"controls": (ControlInput(name="depth", image=IMAGE, scale=1.5),)},
        "depth",
        {"controlnet_conditioning_scale": 1.5},
    ),
    ({"controls": (ControlInput(name="edges", image=IMAGE, end=0.5),)}, "edges", {"control_guidance_end": 0.5}),
    (
        {"control_image": IMAGE, "parameters": {"controlnet_conditioning_scale": 0.8}},
        "edges",
        {"controlnet_conditioning_scale": 0.8},
    ),
)


def write_base(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "calotype.json").write_text(json.dumps({"native_sizes": [[64, 64]]}))
    return folder


@pytest.mark.parametrize("name", [pytest.param("sdxl", marks=pytest.mark.slow), "flux"])
def test_controlnets(name: str, tmp_path: Path) -> None:
    """A class with a ControlNet runs on a base model's folder. Jobs choose the ControlNet, its scale and its steps."""
    case = CONTROL_CASES[name]
    base = write_base(case.build(), tmp_path / "base")
    nets = {"edges": case.control(0), "depth": case.control(1)}
    folders = {net: str(tmp_path / net) for net in nets}
    for net, folder in folders.items():
        nets[net].save_pretrained(folder, safe_serialization=True)
    model = load_model("qc", source=f"{case.pipeline}:{base}", adapters=Adapters(controls=folders))
    assert isinstance(model, PipelineModel)
    common = [replace(request, control_image=None) for request in four(model)]
    requests = [replace(request, **own) for request, (own, _, _) in zip(common, CONTROLS, strict=True)]

    plain = getattr(diffusers, case.pipeline).from_pretrained(base, controlnet=nets["edges"])
    plain.set_progress_bar_config(disable=True)
    expected = []
    for request, (_, net, arguments) in zip(common, CONTROLS, strict=True):
        plain.controlnet = nets[net]
        given = model.arguments.of(replace(request, control_image=IMAGE), model="")
        expected.append(plain(**{**given, case.image: Image.fromarray(IMAGE), **arguments}))

    together(model, requests)  # verifies calls with the second ControlNet, which start-up does not rehearse
    with counted(model, case.denoiser) as calls:
        runs = together(model, requests)
    for run, result in zip(runs, expected, strict=True):
        assert run.error is None
        assert difference(run.result, result) <= 3e-5
    assert difference(model.plain(requests[LONGEST]), expected[LONGEST]) == 0.0
    assert calls.total() <= requests[LONGEST].num_inference_steps, model.summary()
    other = replace(requests[1], controls=(ControlInput(name="edges", image=IMAGE, scale=1.5),))
    assert difference(model.plain(other), expected[1]) > 1e-2, "the ControlNets are too alike to tell them apart"


def test_refused_controlnets(tmp_path: Path) -> None:
    """What does not go together is refused at start, and jobs that the model cannot run at submission."""
    base = write_base(flux1.flux(), tmp_path / "base")
    folders = {}
    for net, build in (("edges", flux1.flux_control), ("sketch", sd.sdxl_control)):
        build(0).save_pretrained(tmp_path / net, safe_serialization=True)
        folders[net] = str(tmp_path / net)
    source = f"FluxControlNetPipeline:{base}"
    for text, given, controls in (
        ("FluxControlNetPipeline needs a ControlNet.*--control qc/NAME=FOLDER", source, {}),
        ("FluxPipeline takes no ControlNets", f"FluxPipeline:{base}", {"edges": folders["edges"]}),
        ("'sketch'.* is a ControlNetModel, .* use a FluxControlNetModel", source, folders),
        ("'edges': .* does not exist", source, {"edges": str(tmp_path / "none")}),
    ):
        with pytest.raises(ModelLoadError, match=text):
            load_model("qc", source=given, adapters=Adapters(controls=controls))

    model = load_model("qc", source=source, adapters=Adapters(controls={"edges": folders["edges"]}))
    assert isinstance(model, PipelineModel)
    assert model.card.controls == ("edges",)
    config: dict[str, Any] = {"model": "qc", "prompt": "a star"}
    use = {"name": "edges", "image": "0" * 64}
    assert resolve(GenerationConfig.parse({**config, "controls": [use]}), {"qc": model.card}).control_names
    with pytest.raises(InvalidRequest, match="needs it"):
        resolve(GenerationConfig.parse(config), {"qc": model.card})
    with pytest.raises(InvalidRequest, match="available: edges"):
        resolve(GenerationConfig.parse({**config, "controls": [{**use, "name": "depth"}]}), {"qc": model.card})
    request = replace(four(model)[0], controls=(ControlInput(name="edges", image=IMAGE),))
    with pytest.raises(InvalidRequest, match="given twice"):
        model.check(request)
    with pytest.raises(InvalidRequest, match="one ControlNet per job"):
        model.check(replace(request, control_image=None, controls=request.controls * 2))
