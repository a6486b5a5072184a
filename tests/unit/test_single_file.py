"""Single-file checkpoints under the original code's key names, and files that are none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype_shared.errors import ModelLoadError
from calotype_worker.engine import Engine
from calotype_worker.models import AnyModel, load_model
from tests.ldm_layout import write_ldm_checkpoint
from tests.models import tiny_pipeline, write_tiny_lora
from tests.unit.test_many_models import request


def draw(model: AnyModel) -> np.ndarray:
    engine = Engine(model)
    engine.start()
    try:
        return engine.submit(request("r")).result(120).image.astype(int)
    finally:
        engine.stop()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """`tiny.safetensors` with the folder `tiny/` beside it, whose weights were taken out."""
    pipeline: Any = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "whole", safe_serialization=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    return write_ldm_checkpoint(pipeline, tmp_path / "tiny.safetensors")


def test_one_file_gives_the_images_of_the_folder(checkpoint: Path) -> None:
    """Every tensor finds its place; with two of them exchanged the image is another."""
    expected = draw(load_model("tiny", source=str(checkpoint.parent / "whole")))
    loaded = load_model("tiny", source=str(checkpoint))
    assert np.abs(draw(loaded) - expected).max() <= 1
    assert loaded.card.version.startswith("sha256:")

    state = load_file(checkpoint)
    one, other = (f"model.diffusion_model.middle_block.{index}.in_layers.2.weight" for index in (0, 2))
    state[one], state[other] = state[other].clone(), state[one].clone()
    save_file(state, checkpoint)
    assert np.abs(draw(load_model("tiny", source=str(checkpoint))) - expected).max() > 1


def test_what_is_no_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """In one line each: what, and what to do."""
    torch.save({}, tmp_path / "old.ckpt")
    (tmp_path / "text.safetensors").write_text("not tensors at all, but long enough to look like some")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-1000])
    write_tiny_lora(tmp_path / "lora.safetensors", seed=1)
    for file, said in {
        "old.ckpt": r"pickle.*never opens.*save_file\(torch.load\(\"old.ckpt\"",
        "text.safetensors": "not a safetensors file",
        "cut.safetensors": r"truncated at \d+ of \d+ bytes",
        "lora.safetensors": "not a checkpoint of a known family.*not a LoRA",
        "absent.safetensors": "does not exist",
    }.items():
        with pytest.raises(ModelLoadError, match=said):
            load_model("tiny", source=str(tmp_path / file))


def test_without_configs_the_way_out_is_said(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing beside the file, and no hub within reach."""
    shutil.rmtree(tmp_path / "tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"tiny.safetensors.*v1.*put a diffusers folder.*beside it as 'tiny'/"):
        load_model("tiny", source=str(checkpoint))


def test_parts_that_the_file_lacks_come_from_the_folder(checkpoint: Path) -> None:
    """With their weights; without them the file is refused, and so is one that holds a part by halves."""
    expected = draw(load_model("tiny", source=str(checkpoint.parent / "whole")))
    whole = load_file(checkpoint)
    save_file({key: value for key, value in whole.items() if not key.startswith("first_stage_model.")}, checkpoint)
    with pytest.raises(ModelLoadError, match=r"has no vae.*weights in tiny/vae/"):
        load_model("tiny", source=str(checkpoint))
    shutil.copy(next((checkpoint.parent / "whole" / "vae").glob("*.safetensors")), checkpoint.parent / "tiny" / "vae")
    assert np.abs(draw(load_model("tiny", source=str(checkpoint))) - expected).max() <= 1
    for part in ("cond_stage_model", "output_blocks"):
        missing = next(key for key in whole if part in key and key.endswith("weight"))
        save_file({key: value for key, value in whole.items() if key != missing}, checkpoint)
        with pytest.raises(ModelLoadError, match="could not be loaded with the configs"):
            load_model("tiny", source=str(checkpoint))
