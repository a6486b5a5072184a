"""Several models on one device, adapters under an LRU, and the settings that trade speed for memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine, Generated, GenerationRequest
from calotype_worker.models import Adapters, Memory, ModelPool, StepModel, load_model
from calotype_worker.request import ControlInput
from tests.models import sample_image, write_tiny_controlnet, write_tiny_lora, write_tiny_sd


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("many")
    return [write_tiny_sd(root / str(seed), seed=seed) for seed in range(3)]


def load(folder: Path, **options: Any) -> StepModel:
    return load_model(f"m{folder.name}", source=str(folder), **options)  # type: ignore[return-value]


def request(name: str, **changes: Any) -> GenerationRequest:
    values = {
        "request_id": name,
        "prompt": "an image",
        "width": 64,
        "height": 64,
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "seed": 1,
        "sampler": SamplerType.DDIM,
    }
    return GenerationRequest(**{**values, **changes})


def run(models: StepModel | ModelPool, requests: list[GenerationRequest]) -> list[Generated]:
    engine = Engine(models)
    engine.start()
    try:
        return [future.result(120) for future in [engine.submit(r) for r in requests]]
    finally:
        engine.stop()


class Watched:
    """A model that notes where it was moved."""

    def __init__(self, model: StepModel, places: list[tuple[str, str]]) -> None:
        self._model, self._places = model, places
        self.device = torch.device("meta")  # anything but the CPU: moves to and fro must show

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def to(self, device: torch.device) -> None:
        self._places.append((self.card.name, device.type))


def test_models_share_a_device_under_a_budget(folders: list[Path]) -> None:
    """Room for two of three: the one used longest ago makes room, and nobody's image changes."""
    models = [load(folder) for folder in folders]
    alone = [run(model, [request("r")])[0].image for model in models]
    pool = ModelPool(models, memory_budget=2 * models[0].weight_bytes + 1)
    assert len(pool.resident) == 2
    order = [0, 1, 2, 0, 2, 1]
    made = run(pool, [request(str(place), model=f"m{index}") for place, index in enumerate(order)])
    for index, result in zip(order, made, strict=True):
        assert np.abs(result.image.astype(int) - alone[index].astype(int)).max() <= 1
    assert pool.moves >= 1
    assert len(pool.resident) == 2


def test_the_model_used_longest_ago_leaves(folders: list[Path]) -> None:
    places: list[tuple[str, str]] = []
    models: list[Any] = [Watched(load(folder), places) for folder in folders]
    pool = ModelPool(models, memory_budget=2 * models[0].weight_bytes)
    assert places == [("m2", "cpu")], "the last one waits outside"
    pool.use("m1")
    pool.use("m2")
    assert places[1:] == [("m0", "cpu"), ("m2", "meta")]
    assert pool.resident == ("m1", "m2")
    with pytest.raises(InvalidRequest, match="memory_budget=1"):
        ModelPool(models, memory_budget=1)
    with pytest.raises(InvalidRequest, match=r"model='absent'.*m0, m1, m2"):
        pool.get("absent")


@pytest.mark.parametrize(
    "memory",
    [
        Memory(attention_slicing=True),
        Memory(vae_slicing=True),
        Memory(offload="model"),
        Memory(offload="sequential"),
    ],
    ids=str,
)
def test_less_memory_gives_the_same_images(folders: list[Path], memory: Memory, tmp_path: Path) -> None:
    """Also with a LoRA, whose layers hook into modules that offloading moves."""
    adapters = Adapters(loras={"first": write_tiny_lora(tmp_path / "first.safetensors", seed=11)})
    wanted = [request("plain"), request("lora", loras=(("first", 1.0),))]
    usual = run(load(folders[0], adapters=adapters), wanted)
    saving = run(load(folders[0], adapters=adapters, memory=memory), wanted)
    for one, other in zip(usual, saving, strict=True):
        assert np.abs(one.image.astype(int) - other.image.astype(int)).max() <= 1
    assert np.abs(usual[0].image.astype(int) - usual[1].image.astype(int)).max() > 12


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_the_same_images(folders: list[Path], dtype: str, tmp_path: Path) -> None:
    """With everything that goes into the network beside latents: a LoRA, a ControlNet, a longer neighbour."""
    adapters = Adapters(
        loras={"first": write_tiny_lora(tmp_path / "first.safetensors", seed=11)},
        controls={"a": str(write_tiny_controlnet(tmp_path / "a", seed=21))},
    )
    wanted = [
        request("plain"),
        request("lora", loras=(("first", 0.5),)),
        request("control", controls=(ControlInput(name="a", image=sample_image(1), scale=0.5),)),
        request("long", prompt="an image of many words. and some more words"),
    ]
    usual = run(load(folders[0], adapters=adapters), wanted)
    half = run(load(folders[0], adapters=adapters, dtype=dtype), wanted)
    for one, other in zip(usual, half, strict=True):
        assert not np.array_equal(one.image, other.image), "it ran in full precision"
        assert np.abs(one.image.astype(int) - other.image.astype(int)).mean() < 6


def test_tiles_give_nearly_the_same_image(folders: list[Path]) -> None:
    """Decoding in tiles is the one saving that changes images: a little."""
    wanted = [request("plain", width=128, height=128)]
    [usual] = run(load(folders[0]), wanted)
    [tiled] = run(load(folders[0], memory=Memory(vae_tiling=True)), wanted)
    assert not np.array_equal(usual.image, tiled.image), "nothing was tiled"
    assert np.corrcoef(usual.image.ravel(), tiled.image.ravel())[0, 1] > 0.7


def test_adapters_leave_memory_by_age(folders: list[Path], tmp_path: Path) -> None:
    """Three LoRAs in one batch with room for one: slower, but right."""
    files = {name: write_tiny_lora(tmp_path / f"{name}.safetensors", seed=seed) for seed, name in enumerate("abc")}
    wanted = [request(name, loras=((name, 1.0),)) for name in files]
    roomy = load(folders[0], adapters=Adapters(loras=files))
    tight = load(folders[0], adapters=Adapters(loras=files, lora_capacity=1))
    for one, other in zip(run(roomy, wanted), run(tight, wanted), strict=True):
        assert np.abs(one.image.astype(int) - other.image.astype(int)).max() <= 1
    assert len(roomy.loras.loaded) == 3  # type: ignore[attr-defined]
    assert len(tight.loras.loaded) == 1  # type: ignore[attr-defined]


def test_adapters_that_do_not_fit_are_refused(folders: list[Path], tmp_path: Path) -> None:
    """By name, with the way out: when the model is loaded, from the files' headers."""
    from safetensors.torch import save_file

    good = write_tiny_lora(tmp_path / "good.safetensors", seed=1)
    wide = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 640)}
    save_file(
        wide | {"unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.zeros(640, 2)}, tmp_path / "x.safetensors"
    )
    torch.save({}, tmp_path / "pickle.pt")
    for name, said in {"x.safetensors": "use one that was trained for", "pickle.pt": "never opened.*save_file"}.items():
        with pytest.raises(ModelLoadError, match=rf"LoRA 'other'.*{said}"):
            load(folders[0], adapters=Adapters(loras={"good": good, "other": tmp_path / name}))
    engine = Engine(load(folders[0], adapters=Adapters(loras={"good": good})))
    engine.start()
    try:
        with pytest.raises(InvalidRequest, match=r"loras='absent'.*good"):
            engine.submit(request("r", loras=(("absent", 1.0),)))
        assert engine.submit(request("r", loras=(("good", 1.0),))).result(120).steps_taken == 6
    finally:
        engine.stop()
