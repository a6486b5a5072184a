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
from tests.unit import published
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


@pytest.mark.parametrize(
    ("marks", "metadata", "scheduler"),
    [
        ({"v_pred": [], "ztsnr": []}, {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ({"v_pred": []}, {}, {"prediction_type": "v_prediction"}),
        ({}, {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        (
            {"edm_vpred.sigma_max": 100.0, "edm_vpred.sigma_min": 0.01},
            {},
            {
                "sigma_max": 100.0,
                "sigma_min": pytest.approx(0.01),
                "sigma_data": 1.0,
                "prediction_type": "v_prediction",
            },
        ),
    ],
    ids=str,
)
def test_a_file_says_what_its_network_predicts(
    marks: dict[str, Any], metadata: dict[str, str], scheduler: dict[str, Any], checkpoint: Path
) -> None:
    """As NoobAI-XL and CosXL do: the noise levels of the base model would give a wrong image."""
    whole = load_file(checkpoint)
    before: Any = load_model("tiny", source=str(checkpoint))
    save_file(whole | {key: torch.tensor(value) for key, value in marks.items()}, checkpoint, metadata=metadata)
    model: Any = load_model("tiny", source=str(checkpoint))
    found = model.scheduler_config
    assert {key: found[key] for key in scheduler} == scheduler
    assert not np.array_equal(published.draw(model), draw(before))


def test_quantized_files_are_refused_by_their_headers(checkpoint: Path) -> None:
    """Their scales would be ignored, and every job would fail as not finite."""
    whole = load_file(checkpoint)
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    packed = {key: torch.zeros(8, 8, dtype=torch.uint8)}
    scaled = {key: whole[key].to(torch.float8_e4m3fn), key.replace(".weight", ".scale_weight"): torch.tensor(0.1)}
    for change, said in ((scaled, "scale_weight"), (packed, "in_layers.2.weight")):
        save_file(whole | change, checkpoint)
        with pytest.raises(ModelLoadError, match=rf"tiny.safetensors' holds quantized weights \(.*{said}\)"):
            load_model("tiny", source=str(checkpoint))


def test_other_suffixes_are_loaded_or_named(checkpoint: Path) -> None:
    """`.sft` and capitals are safetensors, which diffusers would open as pickles; GGUF is named."""
    expected = draw(load_model("tiny", source=str(checkpoint)))
    for name in ("tiny.sft", "tiny.SAFETENSORS"):
        other = checkpoint.rename(checkpoint.with_name(name))
        assert np.abs(draw(load_model("tiny", source=str(other))) - expected).max() <= 1
        other.rename(checkpoint)
    checkpoint.with_suffix(".gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"'tiny.gguf' is a GGUF checkpoint"):
        load_model("tiny", source=str(checkpoint.with_suffix(".gguf")))


def test_a_file_with_more_than_its_configs_use_is_refused(checkpoint: Path) -> None:
    """diffusers drops such tensors in silence."""
    whole = load_file(checkpoint)
    save_file(whole | {"model.diffusion_model.guidance_in.weight": torch.zeros(4, 4)}, checkpoint)
    with pytest.raises(ModelLoadError, match=r"holds \d+ values of a network, and with its configs only \d+ are used"):
        load_model("tiny", source=str(checkpoint))
