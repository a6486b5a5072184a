"""Where a pipeline's networks are, and that what is asked for to save memory happens or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.models import Adapters, Memory, ModelPool, PipelineModel
from tests.fake_gpu import GPU, pretended_gpu
from tests.unit.pipelines.builders import sd, sound_and_mesh
from tests.unit.pipelines.driver import batch, difference, four, load, run_of, together
from tests.unit.pipelines.test_adapters import CASES, LORAS, write_two


def far(pipeline: Any, memory: Memory, *, merging: bool = False, adapters: Adapters | None = None) -> PipelineModel:
    """The pipeline on the pretended GPU."""
    pipeline.set_progress_bar_config(disable=True)
    return PipelineModel(
        pipeline,
        name="far",
        version="0",
        device=GPU,
        dtype=torch.float32,
        memory=memory,
        merging=merging,
        adapters=adapters,
        notes={"native_sizes": [[64, 64]]},
    )


def resident(model: PipelineModel) -> set[str]:
    """The networks on the GPU."""
    return {name for name, module in model.modules.items() if any(p.device == GPU for p in module.parameters())}


@contextmanager
def placements(model: PipelineModel) -> Iterator[dict[str, set[frozenset[str]]]]:
    """By the network that is called, which networks were on the GPU then."""
    found: dict[str, set[frozenset[str]]] = {}
    place = model._stand_ins

    def note(network: str) -> Any:
        return lambda *_: found.setdefault(network, set()).add(frozenset(resident(model)))

    hooks = [
        child.register_forward_pre_hook(note(name))
        for name, module in place.modules.items()
        for child in [next(iter(module.children()))]  # of `encode` and `decode`, too
    ]
    model._watched.refresh()
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.slow
def test_offloaded_by_network() -> None:
    """Only the network that is called is on the device; with a budget, as many as fit. Results are the same."""
    near = load(sd.stable_diffusion())
    requests = four(near)[:2]
    plain = [near.plain(request) for request in requests]
    with pretended_gpu():
        model = far(sd.stable_diffusion(), Memory(offload="model"), merging=True)
        sizes = {name: sum(p.numel() * 4 for p in module.parameters()) for name, module in model.modules.items()}
        assert model.weight_bytes == max(sizes.values()) == sizes["unet"]
        assert model.card.features == near.card.features
        with placements(model) as found:
            runs = together(model, requests)
        assert {name: {*map(frozenset, [{name}])} for name in ("text_encoder", "unet")} == {
            name: found[name] for name in ("text_encoder", "unet")
        }
        for run, expected in zip(runs, plain, strict=True):
            assert run.error is None
            assert difference(run.result, expected) <= 3e-5
        model.to(torch.device("cpu"))
        assert resident(model) == set()

        budget = sizes["unet"] + sizes["text_encoder"]
        model = far(sd.stable_diffusion(), Memory(offload="model", budget=budget))
        assert model.weight_bytes == budget
        with placements(model) as found:
            together(model, requests[:1])
        assert frozenset({"text_encoder", "unet"}) in found["unet"]
        assert all(sum(sizes[name] for name in there) <= budget for seen in found.values() for there in seen)


@pytest.mark.slow
def test_loras_of_offloaded_networks(tmp_path: Path) -> None:
    """LoRAs act on the rows of their requests wherever the networks' weights were; by layer they are refused."""
    adapters = Adapters(loras=write_two(CASES["sdxl"], tmp_path))
    near = load(sd.sdxl(), adapters=adapters)
    requests = [replace(request, loras=loras) for request, loras in zip(four(near), LORAS, strict=True)]
    plain = [near.plain(request) for request in requests]
    with pretended_gpu():
        model = far(sd.sdxl(), Memory(offload="model"), merging=True, adapters=adapters)
        for run, expected in zip(together(model, requests), plain, strict=True):
            assert run.error is None
            assert difference(run.result, expected) <= 1e-4
        assert len(resident(model)) == 1
    with pytest.raises(ModelLoadError, match="--offload model"):
        load(sd.sdxl(), adapters=adapters, memory=Memory(offload="sequential"))


def test_offloaded_by_layer() -> None:
    """With accelerate's hooks each layer's weights come and go; results are the same."""
    model = load(sd.stable_diffusion())
    requests = four(model)[:2]
    plain = [model.plain(request) for request in requests]
    pipeline = sd.stable_diffusion()
    pipeline.set_progress_bar_config(disable=True)
    sequential = PipelineModel(
        pipeline,
        name="layers",
        version="0",
        device=torch.device("cpu"),
        dtype=torch.float32,
        memory=Memory(offload="sequential"),
    )
    assert all(p.device.type == "meta" for p in sequential.modules["unet"].parameters())
    assert sequential.weight_bytes < model.weight_bytes / 4
    for run, expected in zip(together(sequential, requests), plain, strict=True):
        assert difference(run.result, expected) <= 3e-5


def test_slices_and_tiles() -> None:
    """The autoencoder's slicing and tiling are on; a pipeline whose networks have none is refused."""
    pipeline = sd.stable_diffusion()
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"version": "0", "device": torch.device("cpu"), "dtype": torch.float32}
    memory = Memory(vae_slicing=True, vae_tiling=True, attention_slicing=True)
    model = PipelineModel(pipeline, name="sliced", memory=memory, **options)
    vae: Any = model.modules["vae"]
    assert (vae.use_slicing, vae.use_tiling) == (True, True)
    requests = four(model)[:2]
    runs = together(model, requests)
    for run, request in zip(runs, requests, strict=True):
        assert difference(run.result, model.plain(request)) <= 3e-5
    with pytest.raises(ModelLoadError, match="--attention-slicing"):
        PipelineModel(sound_and_mesh.stable_audio(), name="sound", memory=Memory(attention_slicing=True), **options)


def test_the_pool_moves_it() -> None:
    """Two offloaded pipelines under one budget: each leaves the device before the other is used."""
    with pretended_gpu():
        models = [far(sd.stable_diffusion(), Memory(offload="model")) for _ in range(2)]
        models[1].card = models[1].card.model_copy(update={"name": "other"})
        pool = ModelPool(models, memory_budget=models[0].weight_bytes)
        for name in ("far", "other", "far"):
            model = pool.use(name)
            assert isinstance(model, PipelineModel)
            request = replace(four(model)[0], num_inference_steps=1)
            running = batch(model)
            with torch.no_grad():
                running.join(run_of(model, request))
                while running.runs:
                    running.step()
            others = [m for m in models if m is not model]
            assert [resident(other) for other in others] == [set()]
            assert len(resident(model)) == 1


def test_not_compiled() -> None:
    """A worker that is to compile refuses to serve a pipeline model, instead of leaving it uncompiled."""
    model = load(sd.stable_diffusion())
    with pytest.raises(InvalidRequest, match=r"compile.*not compiled.*another worker"):
        Engine(model, EngineSettings(compile="default"))
