"""A model is loaded whole and right, or refused at start with the file, the key and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from calotype_shared.errors import GenerationFailed, ModelLoadError
from calotype_shared.schema.enums import Feature
from calotype_worker.engine import Engine
from calotype_worker.models import load_model
from calotype_worker.models.text_check import check_text
from tests import family_models as tiny
from tests.models import byte_tokenizer, tiny_pipeline, write_tiny_sd
from tests.unit.published import apart, draw, plain, request


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_sd(tmp_path / "tiny")


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (values | changes).items() if value is not ...}))


# ---- tokenizers


def test_a_tokenizer_must_fit_its_text_encoder(folder: Path, tmp_path: Path) -> None:
    """Else the prompt has no effect, or no job succeeds."""
    for file in (folder / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ModelLoadError, match=r"'m': .*tokenizer"):
        load_model("m", source=str(folder))

    other = tmp_path / "sd3"
    tiny.write(tiny.tiny_sd3(), other)
    tiny.t5_tokenizer().save_pretrained(other / "tokenizer_2")
    with pytest.raises(
        ModelLoadError, match=r"tokenizer_2/ ends a prompt with token 1, and text_encoder_2/ expects \d+"
    ):
        load_model("m", source=str(other))


def test_a_missing_length_is_that_of_the_text_encoder(folder: Path, tmp_path: Path) -> None:
    """In every family; a length that the encoder does not have is refused."""
    expected = plain(folder)
    config = folder / "tokenizer" / "tokenizer_config.json"
    edit(config, model_max_length=...)
    model = load_model("m", source=str(folder))
    assert model.card.max_prompt_tokens == 24
    assert apart(draw(model), expected) <= 1
    edit(config, model_max_length=100)
    with pytest.raises(ModelLoadError, match="allows prompts of 100 tokens, and text_encoder/ reads 24"):
        load_model("m", source=str(folder))

    flux = tiny.write(tiny.tiny_flux(), tmp_path / "flux")
    (flux / "calotype.json").write_text('{"native_sizes": [[64, 64]]}')
    expected = draw(load_model("m", source=str(flux)))
    edit(flux / "tokenizer" / "tokenizer_config.json", model_max_length=...)
    assert apart(draw(load_model("m", source=str(flux))), expected) == 0


def test_an_encoder_that_does_not_name_its_embeddings_is_loaded() -> None:
    """As Kandinsky's, whose class is diffusers' own."""

    class Own(torch.nn.Module):
        config = SimpleNamespace()

        def get_input_embeddings(self) -> torch.nn.Module:
            raise NotImplementedError

    check_text("m", SimpleNamespace(components={"text_encoder": Own(), "tokenizer": byte_tokenizer()}))


def test_a_text_encoder_without_tokenizer_is_refused(folder: Path) -> None:
    edit(folder / "model_index.json", tokenizer=[None, None])
    with pytest.raises(ModelLoadError, match=r"it has a text_encoder/, but no tokenizer/; complete the folder"):
        load_model("m", source=str(folder))


# ---- autoencoders and previews


def test_a_tiny_autoencoder_previews_and_does_not_claim_what_it_cannot(tmp_path: Path) -> None:
    """It draws no noise when it encodes, so its image-to-image would not be diffusers'."""
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    pipeline.vae = diffusers.AutoencoderTiny(**blocks, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)
    folder = tiny.write(pipeline, tmp_path / "taesd")
    model: Any = load_model("m", source=str(folder))
    assert {Feature.IMAGE_TO_IMAGE, Feature.INPAINTING}.isdisjoint(model.card.features)
    assert {Feature.TEXT_TO_IMAGE, Feature.PREVIEW} <= model.card.features
    assert apart(draw(model), plain(folder)) <= 1
    assert model.preview(torch.randn(4, 8, 8)).shape == (8, 8, 3)


def test_an_asymmetric_autoencoder_is_used_as_diffusers_does(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    pipeline.vae = diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        down_block_out_channels=(8,) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        up_block_out_channels=(16,) * 4,
        layers_per_down_block=1,
        layers_per_up_block=1,
        norm_num_groups=4,
    )
    folder = tiny.write(pipeline, tmp_path / "asymmetric")
    model: Any = load_model("m", source=str(folder))
    assert Feature.IMAGE_TO_IMAGE in model.card.features
    assert apart(draw(model), plain(folder)) <= 1


def test_an_autoencoder_that_cannot_be_used_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"its autoencoder's images are not finite.*--dtype float32"):
        load_model("m", source=str(folder))
    pipeline = tiny_pipeline()
    pipeline.vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4
    )
    with pytest.raises(ModelLoadError, match="its autoencoder is of class AutoencoderKLTemporalDecoder, and only"):
        load_model("m", source=str(tiny.write(pipeline, tmp_path / "other")))


def test_a_failed_preview_fails_its_request_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the exception, in the model or in the receiver: the engine and everybody's jobs go on."""
    model: Any = load_model("m", source=str(folder))
    expected = draw(model)

    def broken(latents: torch.Tensor) -> np.ndarray:
        raise AttributeError("no latent_dist")

    monkeypatch.setattr(model, "preview", broken)
    engine = Engine(model, on_preview=lambda *_: None)
    engine.start()
    try:
        bad = engine.submit(request(model, request_id="bad", preview_every=1))
        good = engine.submit(request(model, request_id="good"))
        with pytest.raises(GenerationFailed, match="no latent_dist"):
            bad.result(120)
        assert apart(good.result(120).image.astype(int), expected) <= 1
    finally:
        engine.stop()

    monkeypatch.undo()

    def receiver(*_: Any) -> None:
        raise OSError("the receiver is gone")

    engine = Engine(model, on_preview=receiver)
    engine.start()
    try:
        image = engine.submit(request(model, preview_every=1)).result(120).image
        assert apart(image.astype(int), expected) <= 1
    finally:
        engine.stop()


# ---- tensors


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    """The file with these tensors changed, or taken out."""
    from safetensors.torch import load_file, save_file

    state = load_file(file) | changes
    save_file({key: value for key, value in state.items() if value is not None}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", "mid_block.resnets.0.conv1.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "encoder.layers.0.mlp.fc1.weight"),
    ],
)
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_every_tensor_is_where_its_config_wants_it(part: str, key: str, change: str, folder: Path) -> None:
    """diffusers and transformers fill what is missing with random numbers, and drop what is left over."""
    file = next((folder / part).glob("*.safetensors"))
    changes: dict[str, tuple[str, torch.Tensor | None, str]] = {
        "missing": (key, None, f"lacks {key}"),
        "unexpected": ("other.weight", torch.zeros(3), "holds tensors that its config has no place for: other.weight"),
        "shape": (key, torch.zeros(3), key),
    }
    changed, value, said = changes[change]
    rewrite(file, **{changed: value})
    with pytest.raises(ModelLoadError, match=rf"'m': {part}/{file.name} .*{said}.*download"):
        load_model("m", source=str(folder))


def test_tensors_that_change_nothing_are_no_reason_to_refuse(folder: Path) -> None:
    """Position ids of old files, the image half of a whole CLIP, and T5's decoder."""
    expected = draw(load_model("m", source=str(folder)))
    file = folder / "text_encoder" / "model.safetensors"
    rewrite(
        file,
        **{
            "text_model.embeddings.position_ids": torch.arange(24)[None],
            "vision_model.encoder.weight": torch.zeros(3),
            "logit_scale": torch.zeros(()),
        },
    )
    assert apart(draw(load_model("m", source=str(folder))), expected) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Invalid JSON"),
        ('{"native_size": [[64, 64]]}', r"native_size=.*Extra inputs.*Its keys: native_sizes, max_pixels"),
        ('{"native_sizes": [64, 64]}', r"native_sizes\.0=64"),
        ('{"native_sizes": [["64", 64]]}', r"native_sizes\.0\.0='64'"),
        ('{"max_pixels": "4096"}', r"max_pixels='4096'"),
        ('{"default_steps": 0}', r"default_steps=0"),
        ('{"default_sampler": "best"}', r"default_sampler='best' is not a sampler of this model; use one of: pndm"),
        ("[]", "is not valid"),
    ],
)
def test_an_operators_notes_are_checked(text: str, said: str, folder: Path) -> None:
    """Else a mistyped key would be ignored, or end the worker with a traceback."""
    (folder / "calotype.json").write_text(text)
    with pytest.raises(ModelLoadError, match=rf"'m': .*calotype.json.*{said}"):
        load_model("m", source=str(folder))
