"""Pipelines loaded from folders: modular ones with the features of their blocks, and what cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_worker.models import PipelineModel, load_model
from calotype_worker.request import GenerationRequest
from tests.unit.pipelines.builders.cascade import stable_cascade
from tests.unit.pipelines.builders.image import dit
from tests.unit.pipelines.builders.modular import modular_flux, modular_qwen
from tests.unit.pipelines.builders.qwen import qwen_image
from tests.unit.pipelines.builders.sd import sd_inpaint, stable_diffusion
from tests.unit.pipelines.driver import difference, four, load, together, without_merging

_SIDE = 64  # pixels


def write(pipeline: object, folder: Path) -> Path:
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)  # type: ignore[attr-defined]
    (folder / "calotype.json").write_text(json.dumps({"native_sizes": [[_SIDE, _SIDE]]}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline in another place than that which its index names."""
    written = write(modular_qwen(), tmp_path_factory.mktemp("saved") / "qwen")
    return Path(shutil.move(written, tmp_path_factory.mktemp("moved")))


def kinds(requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """Two of them from noise, one from an image, and one that fills in the masked part of one."""
    image = np.random.default_rng(5).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    mask = np.tile(np.arange(_SIDE) < _SIDE // 2, (_SIDE, 1))
    return [
        requests[0],
        replace(requests[1], init_image=image, strength=0.7),
        replace(requests[2], init_image=image, mask=mask, strength=0.8),
        requests[3],
    ]


def test_blocks_by_inputs(folder: Path) -> None:
    """A loaded folder takes what its blocks and parts allow; requests for other blocks share calls, each as alone."""
    model = load_model("qwen", source=str(folder))
    assert isinstance(model, PipelineModel)
    # The blocks know ControlNets too, but the folder has none.
    assert model.card.features == {"text_to_image", "image_to_image", "inpainting"}
    assert model.card.needs == ()
    assert model.card.default_guidance == 4.0
    requests = kinds(four(model))
    plain = [model.plain(request) for request in requests]
    for runs in (together(model, requests), together(model, requests)):
        for run, expected in zip(runs, plain, strict=True):
            assert run.error is None
            assert difference(run.result, expected) <= (1 if expected["images"][0] is None else 1e-5)
            assert model.read(run.result).kind == "image"
    for run, expected in zip(without_merging(model, requests), plain, strict=True):
        assert difference(run.result, expected) == 0.0
    with pytest.raises(InvalidRequest, match="control_image"):
        model.check(replace(requests[0], control_image=np.zeros((_SIDE, _SIDE, 3), np.uint8)))


@pytest.mark.slow
def test_classes_folder_as_blocks(tmp_path: Path) -> None:
    """`CLASS:FOLDER` runs the folder of a pipeline class by blocks, with equal images."""
    pipeline = qwen_image()
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    blocks = load_model("blocks", source=f"QwenImageModularPipeline:{tmp_path}")
    assert isinstance(blocks, PipelineModel)
    whole = load(pipeline)
    for request in four(whole)[:2]:
        own, expected = blocks.read(blocks.plain(request)), whole.read(whole.plain(request))
        assert own.image is not None
        assert expected.image is not None
        assert np.abs(own.image.astype(int) - expected.image.astype(int)).max() <= 1


def test_required_arguments() -> None:
    """Parameters without a default are asked for; a class with others that no job can give is refused."""
    from diffusers import StableCascadeDecoderPipeline

    model = load(dit())
    request = four(model)[0]
    model.check(request)
    with pytest.raises(InvalidRequest, match=r"parameters\.class_labels"):
        model.check(replace(request, parameters={}))
    parts = stable_cascade().decoder_pipe.components
    with pytest.raises(ModelLoadError, match="requires image_embeddings, which jobs cannot give"):
        load(StableCascadeDecoderPipeline(**parts))


def test_images_that_a_first_run_asks_for() -> None:
    """A signature may call images optional that the pipeline cannot do without."""
    card = load(sd_inpaint()).card
    assert set(card.needs) == {"init_image", "mask_image"}
    assert "inpainting" in card.features
    assert not {"image_to_image", "text_to_image"} & card.features
    assert load(stable_diffusion()).card.needs == ()


def test_broken_part(folder: Path, tmp_path: Path) -> None:
    """A part that cannot be loaded is named, and so is code of a repository's own, which never runs."""
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "vae" / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"vae.*config\.json"):
        load_model("broken", source=str(broken))
    own = write(modular_flux(), tmp_path / "own")
    (own / "blocks.py").write_text("raise SystemExit\n")
    (own / "modular_config.json").write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "blocks.Blocks"}}))
    with pytest.raises(ModelLoadError, match="trust_remote_code"):
        load_model("own", source=str(own))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="nothing is missing")
def test_missing_package(tmp_path: Path) -> None:
    """A part that needs a package which is not installed: the error names it."""
    qwen_image().save_pretrained(tmp_path, safe_serialization=True)
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "processor")
    (tmp_path / "processor" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "Qwen2VLImageProcessor"}'
    )
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": "QwenImageEditPipeline", "processor": ["transformers", "Qwen2VLProcessor"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="needs the package torchvision, which is not installed"):
        load_model("edit", source=str(tmp_path))
