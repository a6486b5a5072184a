"""`calotype model check`: what a source is and what is wrong with it, from headers, as a worker would find it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype_shared.errors import ModelLoadError
from calotype_worker.model_check import main
from calotype_worker.models import load_model
from calotype_worker.models.check import check_source
from tests import family_models as tiny
from tests.ldm_layout import write_ldm_checkpoint
from tests.models import tiny_pipeline, write_tiny_sd


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(file) | tensors
    save_file({key: value for key, value in state.items() if value is not None}, file, metadata={"format": "pt"})


def replace_text(file: Path, old: str, new: str) -> int:
    return file.write_text(file.read_text().replace(old, new))


TEXT = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: change(f / UNET, **{"conv_in.bias": None}), "lacks conv_in.bias"),
    "unexpected": (lambda f: change(f / UNET, **{"other.bias": torch.zeros(2)}), "other.bias"),
    "shape": (
        lambda f: change(f / TEXT, **{"final_layer_norm.bias": torch.zeros(2)}),
        "final_layer_norm.bias",
    ),
    "truncated": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-9]), "is truncated at"),
    "notes": (lambda f: (f / "calotype.json").write_text('{"size": 1}'), "size=1"),
    "part": (lambda f: shutil.rmtree(f / "vae"), "there is no vae/"),
    "class": (
        lambda f: replace_text(f / "model_index.json", '"StableDiffusionPipeline"', '"Future"'),
        "'Future' is not",
    ),
    "length": (lambda f: replace_text(f / "tokenizer/tokenizer_config.json", ": 24", ": 100"), "prompts of 100 tokens"),
    "scheduler": (
        lambda f: (
            diffusers.CMStochasticIterativeScheduler().save_pretrained(f / "scheduler"),
            replace_text(f / "model_index.json", "PNDMScheduler", "CMStochasticIterativeScheduler"),
        ),
        "its scheduler CMStochasticIterativeScheduler has noise levels",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_check_finds_what_loading_would(name: str, tmp_path: Path) -> None:
    """The same problem, with the same name in it."""
    folder = write_tiny_sd(tmp_path / "tiny")
    break_it, said = BREAKS[name]
    break_it(folder)
    found = check_source(str(folder))
    assert [problem for problem in found.problems if said in problem], found.problems
    with pytest.raises(ModelLoadError, match=said):
        load_model("m", source=str(folder))


@pytest.mark.parametrize("make", [tiny.tiny_sdxl, tiny.tiny_refiner, tiny.tiny_sd3, tiny.tiny_flux])
def test_a_sound_folder_has_no_problems(make: Callable[[], Any], tmp_path: Path) -> None:
    folder = tiny.write(make(), tmp_path / "model")
    found = check_source(str(folder))
    assert found.problems == []
    assert found.unchecked == []
    assert found.runs == "in step batches"
    assert "euler" in found.samplers
    assert {part["part"] for part in found.parts} >= {"vae", "text_encoder_2"}
    assert check_source(str(folder), as_pipeline=True).problems == []


def test_the_command_says_it_in_a_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 6 and the problem, or 0; `--json` for scripts."""
    file = write_ldm_checkpoint(tiny_pipeline(), tmp_path / "tiny.safetensors")
    assert main([str(file)]) == 0
    text = capsys.readouterr().out
    assert "is: a v1 checkpoint (StableDiffusionPipeline)" in text
    assert "not checked: configs and tokenizers" in text
    state = load_file(file)
    save_file(state | {"model.diffusion_model.out.2.scale_weight": torch.tensor(1.0)}, file)
    assert main([str(file), "--json"]) == 6
    report = json.loads(capsys.readouterr().out)
    assert "holds quantized weights" in report["problems"][0]
    assert main([str(tmp_path / "nothing"), "--nonsense"]) == 2


def test_a_lora_is_named_and_its_unknown_keys_are_problems(tmp_path: Path) -> None:
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{module}.lora_A.weight": torch.ones(4, 32), f"{module}.lora_B.weight": torch.ones(32, 4)}
    save_file(pair, tmp_path / "whole.safetensors")
    report = check_source(str(tmp_path / "whole.safetensors"))
    assert (report.what, report.problems) == ("a LoRA, for --lora", [])
    save_file(pair | {"strange.weight": torch.ones(2)}, tmp_path / "strange.safetensors")
    (problem,) = check_source(str(tmp_path / "strange.safetensors")).problems
    assert "strange.weight" in problem
