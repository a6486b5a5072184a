"""LoRAs, ControlNets and textual inversions of pipelines: each request has its own, in calls that are merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.resolve import resolve
from calotype_worker.models.latent import Adapters
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.request import GenerationRequest
from tests.unit.pipelines import builders
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
    "flux": Case(builders.flux, ("transformer", "text_encoder"), 64),
    "sdxl": Case(builders.sdxl, ("unet", "text_encoder", "text_encoder_2")),
    # The captions of all rows go end to end through one layer of the network, so no row's weight can be applied there.
    "z_image": Case(builders.z_image, ("transformer",), 64, merged=False),
}
SLOW_CASES = {
    "qwen_image": Case(builders.qwen_image, ("transformer",)),
    "wan": Case(builders.wan, ("transformer",), 32),
    "animatediff": Case(tiny_animatediff, ("unet",)),  # frames are folded into the rows, or cells of a frame are
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


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_loras(name: str, tmp_path: Path) -> None:
    """Requests with two LoRAs, either or none share calls, and each equals plain diffusers with `set_adapters`."""
    case = {**CASES, **SLOW_CASES}[name]
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
        assert difference(run.result, roomy.plain(request)) <= 1e-5
    assert len(model.loras.loaded) == 1
    assert len(roomy.loras.loaded) == 2


def test_refused_lora_files(tmp_path: Path) -> None:
    """A file is refused at start, with the names of the entries that would not be used."""
    case = CASES["flux"]
    good = load_file(write_two(case, tmp_path)["second"])
    left = {
        "another network's": {"prior.attn.to_q.lora_A.weight": torch.ones(2, 2)},
        "DoRA": {"transformer.x_embedder.lora_magnitude_vector": torch.ones(32)},
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


def test_class_without_loras(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="PixArtSigmaPipeline takes no LoRAs"):
        load(builders.pixart_sigma(), adapters=Adapters(loras={"any": tmp_path / "any.safetensors"}))
