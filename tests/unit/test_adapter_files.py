"""LoRA files of every kind: each key is used, or the file is refused with the keys' names when the model is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype_shared.errors import ModelLoadError
from calotype_worker.models import Adapters, load_model
from tests import family_models as tiny
from tests.models import tiny_pipeline, write_kohya_lora, write_tiny_lora, write_tiny_sd
from tests.unit.published import apart, draw, draw_all, plain, request

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
CONV = "down_blocks.1.resnets.0.conv2"
NORM = "mid_block.attentions.0.norm"
State = dict[str, torch.Tensor]
Delta = Callable[[torch.Tensor, State], torch.Tensor]


def noise(*shape: int, seed: int, std: float = 0.5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("adapters") / "tiny")


def flat(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


def loha(out: int, ins: int, core: bool = False) -> tuple[State, torch.Tensor]:
    """(parts, change of the weight): LyCORIS' formula, with alpha 2 at rank 4."""
    if core:
        parts = {
            f"hada_w{n}_{s}": noise(4, d, seed=i)
            for i, (n, s, d) in enumerate([("1", "a", out), ("1", "b", ins), ("2", "a", out), ("2", "b", ins)])
        }
        parts |= {f"hada_t{n}": noise(4, 4, 3, 3, seed=9 + int(n)) for n in "12"}
        one, two = (
            torch.einsum("ijkl,jr,ip->prkl", parts[f"hada_t{n}"], parts[f"hada_w{n}_b"], parts[f"hada_w{n}_a"])
            for n in "12"
        )
    else:
        parts = {f"hada_w{n}_a": noise(out, 4, seed=int(n)) for n in "12"}
        parts |= {f"hada_w{n}_b": noise(4, ins, seed=2 + int(n)) for n in "12"}
        one, two = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in "12")
    return parts | {"alpha": torch.tensor(2.0)}, one * two * 2 / 4


def lokr(out: int, ins: int) -> tuple[State, torch.Tensor]:
    parts = {
        "lokr_w1": noise(4, 8, seed=1),
        "lokr_w2_a": noise(out // 4, 2, seed=2),
        "lokr_w2_b": noise(2, ins // 8, seed=3),
    }
    change = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    return parts | {"alpha": torch.tensor(1.0)}, change * 1 / 2


def locon(out: int, ins: int) -> tuple[State, torch.Tensor]:
    """With a core, as LyCORIS writes it for CP decomposition."""
    down, mid, up = noise(4, ins, 1, 1, seed=1), noise(4, 4, 3, 3, seed=2), noise(out, 4, 1, 1, seed=3)
    change = torch.einsum("oa,abhw,bi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    return parts, change * 2 / 4


def test_relatives_of_lora_are_merged_into_their_layers(folder: Path, tmp_path: Path) -> None:
    """LoHa, LoKr, LoCon with a core, full differences with biases and norms, as merged by hand; two in one batch."""
    unet = tiny_pipeline().unet
    out, ins = unet.get_submodule(LINEAR).weight.shape
    conv_out, conv_ins = unet.get_submodule(CONV).weight.shape[:2]
    diff = {"diff": noise(out, ins, seed=1), "diff_b": noise(conv_out, seed=2)}
    norm = {"w_norm": noise(64, seed=3), "b_norm": noise(64, seed=4)}
    kinds: dict[str, tuple[State, dict[str, torch.Tensor]]] = {}
    for name, module, (parts, change) in (
        ("loha", LINEAR, loha(out, ins)),
        ("loha-core", CONV, loha(conv_out, conv_ins, core=True)),
        ("lokr", LINEAR, lokr(out, ins)),
        ("locon", CONV, locon(conv_out, conv_ins)),
        ("diff", LINEAR, ({"diff": diff["diff"]}, diff["diff"])),
    ):
        kinds[name] = ({f"{flat(module)}.{key}": value for key, value in parts.items()}, {f"{module}.weight": change})
    kinds["bias"] = ({f"{flat(CONV)}.diff_b": diff["diff_b"]}, {f"{CONV}.bias": diff["diff_b"]})
    kinds["norm"] = (
        {f"{flat(NORM)}.{key}": value for key, value in norm.items()},
        {f"{NORM}.weight": norm["w_norm"], f"{NORM}.bias": norm["b_norm"]},
    )
    files = {}
    for name, (state, _) in kinds.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(state, files[name])
    model: Any = load_model("m", source=str(folder), adapters=Adapters(loras=files))
    wanted = [request(model, request_id=name, loras=((name, 0.7),)) for name in kinds]
    images = draw_all(model, [*wanted, request(model)])
    for (name, (_, changes)), image in zip(kinds.items(), images[:-1], strict=True):
        merged = copy.deepcopy(tiny_pipeline())
        with torch.no_grad():
            for key, change in changes.items():
                parameter = merged.unet.get_parameter(key)
                parameter += 0.7 * change.reshape(parameter.shape)
        assert apart(image, plain(folder, pipeline=merged)) <= 1, name
        assert apart(image, images[-1]) > 3, f"{name} had no effect"


def dora_by_peft(file: Path) -> Path:
    """A DoRA as peft writes it: linear layers and a convolution."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = tiny_pipeline()
    torch.manual_seed(5)
    targets = ["to_q", "to_v", "conv2"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, use_dora=True)
    pipeline.unet.add_adapter(config)
    for name, weight in pipeline.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
        if "magnitude" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    layers = get_peft_model_state_dict(pipeline.unet)
    metadata = {"r": 4, "lora_alpha": 8, "target_modules": targets, "use_dora": True}
    pipeline.save_lora_weights(
        file.parent,
        unet_lora_layers=layers,
        unet_lora_adapter_metadata=metadata,
        weight_name=file.name,
        safe_serialization=True,
    )
    return file


def test_dora_and_biases_are_those_of_peft(folder: Path, tmp_path: Path) -> None:
    """DoRA's norm depends on the weight; a row without it is not touched."""
    dora = dora_by_peft(tmp_path / "dora.safetensors")
    biased = tmp_path / "biased.safetensors"
    state = load_file(write_tiny_lora(biased, seed=1))
    ups = [key for key in state if key.endswith("to_q.lora_B.weight")]
    biases = {key.replace(".weight", ".bias"): noise(len(state[key]), seed=i) for i, key in enumerate(ups)}
    save_file(state | biases, biased)
    model: Any = load_model("m", source=str(folder), adapters=Adapters(loras={"dora": dora, "biased": biased}))
    wanted = [
        request(model, request_id="1", loras=(("dora", 0.6),)),
        request(model, request_id="2", loras=(("dora", 1.0),)),
        request(model, request_id="3"),
    ]
    images = draw_all(model, wanted)
    for image, weight in zip(images[:2], (0.6, 1.0), strict=True):
        reference = tiny_pipeline()
        reference.load_lora_weights(str(dora), adapter_name="dora")
        reference.set_adapters(["dora"], [weight])
        assert apart(image, plain(folder, pipeline=reference)) <= 1
        assert apart(image, images[2]) > 12
    assert apart(images[2], plain(folder)) <= 1

    merged = tiny_pipeline()
    with torch.no_grad():
        for key, up in state.items():
            if key.endswith("lora_B.weight"):
                module = merged.unet.get_submodule(key.removeprefix("unet.").removesuffix(".lora_B.weight"))
                down = state[key.replace("lora_B", "lora_A")]
                change = up.flatten(1) @ down.flatten(1)  # without alpha: its rank
                module.weight += change.reshape(module.weight.shape)
                if (bias := biases.get(key.replace(".weight", ".bias"))) is not None:
                    module.bias = torch.nn.Parameter(bias + (0 if module.bias is None else module.bias))
    assert apart(draw(model, loras=(("biased", 1.0),)), plain(folder, pipeline=merged)) <= 1


def test_kohyas_dora_blends_the_whole_change(folder: Path, tmp_path: Path) -> None:
    """As ComfyUI does: W + weight · (the DoRA's W - W)."""
    module = tiny_pipeline().unet.get_submodule(LINEAR)
    down, up, scale = noise(4, 64, seed=1), noise(64, 4, seed=2), noise(64, 1, seed=3).abs() + 0.5
    file = tmp_path / "kohya.safetensors"
    name = flat(LINEAR)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(8.0)}
    save_file(state | {f"{name}.dora_scale": scale}, file)
    model: Any = load_model("m", source=str(folder), adapters=Adapters(loras={"dora": file}))
    merged = tiny_pipeline()
    with torch.no_grad():
        weight = module.weight + 2 * up @ down
        weight = scale * weight / weight.norm(dim=1, keepdim=True)
        own = merged.unet.get_submodule(LINEAR).weight
        own += 0.7 * (weight - own)
    assert apart(draw(model, loras=(("dora", 0.7),)), plain(folder, pipeline=merged)) <= 1

    save_file(state | {f"{name}.dora_scale": scale.T.contiguous()}, file)
    with pytest.raises(ModelLoadError, match="its DoRA magnitudes are not one for each output"):
        load_model("m", source=str(folder), adapters=Adapters(loras={"dora": file}))


def test_files_with_keys_that_cannot_be_used_are_refused_at_start(folder: Path, tmp_path: Path) -> None:
    """With the names of the keys; a missing or broken file too. So no worker advertises what fails in every job."""
    good = load_file(write_tiny_lora(tmp_path / "good.safetensors", seed=1))
    kohya = load_file(write_kohya_lora(tmp_path / "kohya.safetensors", tmp_path / "good.safetensors"))
    first = next(key for key in good if key.endswith("lora_B.weight"))
    pair = {"lora_A.weight": noise(2, 64, seed=1), "lora_B.weight": noise(64, 2, seed=2)}
    bad: dict[str, tuple[State, str]] = {
        "norm": (good | {"unet.mid_block.norm_q.weight": noise(8, seed=1)}, "unet.mid_block.norm_q.weight"),
        "oft": (kohya | {f"{flat(LINEAR)}.oft_blocks": noise(4, 4, seed=1)}, f"{flat(LINEAR)}.oft_blocks"),
        "half": ({key: value for key, value in good.items() if key != first}, first.replace("lora_B", "lora_A")),
        "elsewhere": (
            good | {f"transformer.blocks.0.{key}": value for key, value in pair.items()},
            "transformer.blocks.0",
        ),
        "absent": (
            good | {f"unet.mid_block.attentions.9.to_q.{key}": value for key, value in pair.items()},
            "attentions.9",
        ),
        "lost": (kohya | {f"{flat('mid_block.nowhere')}.hada_w1_a": noise(4, 4, seed=1)}, "mid_block"),
        "kernel": (
            {
                f"unet.{CONV}.lora_A.weight": noise(2, 64, 5, 5, seed=1),
                f"unet.{CONV}.lora_B.weight": noise(64, 2, 1, 1, seed=2),
            },
            f"{CONV} does not fit this model: its kernel is another",
        ),
    }
    for name, (state, said) in bad.items():
        file = tmp_path / f"{name}.safetensors"
        save_file(state, file)
        with pytest.raises(ModelLoadError, match=f"LoRA 'x': .*{said}"):
            load_model("m", source=str(folder), adapters=Adapters(loras={"x": file}))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "good.safetensors").read_bytes()[:-100])
    for file, said in ((tmp_path / "nope.safetensors", "does not exist"), (cut, "is truncated at")):
        with pytest.raises(ModelLoadError, match=f"LoRA 'x': .*{said}"):
            load_model("m", source=str(folder), adapters=Adapters(loras={"x": file}))


def test_flux_loras_keep_every_key(tmp_path: Path) -> None:
    """kohya's fused layers are split by diffusers; what it would drop is refused, as Flux' control LoRAs are."""
    pipeline = tiny.tiny_flux()
    folder = tiny.write(pipeline, tmp_path / "flux")
    (folder / "calotype.json").write_text('{"native_sizes": [[64, 64]]}')
    width = 32
    fused = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {
        f"{fused}.lora_down.weight": noise(4, width, seed=1),
        f"{fused}.lora_up.weight": noise(3 * width, 4, seed=2),
        f"{fused}.alpha": torch.tensor(4.0),
    }
    file = tmp_path / "kohya.safetensors"
    save_file(state, file)
    load_model("m", source=str(folder), adapters=Adapters(loras={"x": file}))
    nowhere = "lora_unet_double_blocks_0_nowhere"
    pair = {
        f"{nowhere}.lora_down.weight": noise(4, width, seed=4),
        f"{nowhere}.lora_up.weight": noise(width, 4, seed=5),
    }
    save_file(state | pair, file)
    with pytest.raises(ModelLoadError, match=rf"Incompatible keys detected: .*{nowhere}.lora_down.weight"):
        load_model("m", source=str(folder), adapters=Adapters(loras={"x": file}))
    save_file(state | {f"{fused}.dora_scale": noise(3 * width, 1, seed=3)}, file)
    with pytest.raises(ModelLoadError, match=rf"layers that diffusers splits.*{fused}.dora_scale"):
        load_model("m", source=str(folder), adapters=Adapters(loras={"x": file}))
    lora = load_file(tiny.write_lora(pipeline, tmp_path / "lora.safetensors"))
    save_file(lora | {"transformer.transformer_blocks.0.attn.norm_q.weight": noise(16, seed=1)}, file)
    with pytest.raises(ModelLoadError, match=r"transformer.transformer_blocks.0.attn.norm_q.weight"):
        load_model("m", source=str(folder), adapters=Adapters(loras={"x": file}))
