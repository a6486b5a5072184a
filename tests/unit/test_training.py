"""Training: what it learns, that it goes on where it stopped, that plain diffusers loads what it saved."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from calotype_shared.errors import InvalidRequest
from calotype_train.__main__ import main, parse, prepare
from calotype_train.checkpoint import load_checkpoint, save_checkpoint
from calotype_train.data import Example, hold_out
from calotype_train.objective import Objective, Weighting
from calotype_train.options import TrainOptions

RECIPES = {
    "lora": ["lora", "--rank", "4", "--learning-rate", "0.02"],
    "textual-inversion": ["textual-inversion", "--token", "<x>", "--initialize-from", "a", "--vectors", "2"],
    "controlnet": ["controlnet", "--learning-rate", "0.003", "--embedding-channels", "4,4,8,8"],
}
STEPS = 16


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a second native size, and few steps for its sample sheets."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_folder, folder)
    notes = {"native_sizes": [[64, 64], [80, 64]], "recommended": {"num_inference_steps": 4}}
    (folder / "calotype.json").write_text(json.dumps(notes))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of discs with captions and control images, two of them of its second size."""
    folder = tmp_path_factory.mktemp("images")
    rng = random.Random(0)
    lines = []
    for number in range(8):
        size = (64, 64) if number < 6 else (80, 64)
        image, control = Image.new("RGB", size, (200, 30, 30)), Image.new("RGB", size)
        x, y = rng.randrange(8, 30), rng.randrange(8, 30)
        ImageDraw.Draw(image).ellipse((x, y, x + 24, y + 24), fill=(240, 230, 20))
        ImageDraw.Draw(control).ellipse((x, y, x + 24, y + 24), outline=(255, 255, 255))
        image.save(folder / f"{number}.png")
        control.save(folder / f"{number}-control.png")
        entry = {"file_name": f"{number}.png", "text": "a <x>", "conditioning_file_name": f"{number}-control.png"}
        lines.append(json.dumps(entry))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a recipe saved after `STEPS` steps; trained once a module."""
    folder = tmp_path_factory.mktemp("trained")

    def get(recipe: str) -> Path:
        out = folder / f"{recipe}{'' if recipe == 'controlnet' else '.safetensors'}"
        if not out.exists():
            assert main(arguments(recipe, images, model, out)) == 0
        return out

    return get


def arguments(recipe: str, data: Path, model: Path, out: Path, *more: str) -> list[str]:
    common = ["--data", str(data), "--model", str(model), "--out", str(out), "--steps", str(STEPS), "--batch-size", "4"]
    return [*RECIPES[recipe], *common, "--warmup-steps", "1", "--checkpoint-every", "8", "--sample-every", "0", *more]


def parsed_options(given: list[str]) -> TrainOptions:
    options = parse(given)
    assert options is not None
    return options


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = out.with_name(out.name + ".training").joinpath("log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_held_out_loss_falls(recipe: str, trained: Callable[[str], Path]) -> None:
    """Measured before the first step, at every checkpoint and at the end, and written to the log."""
    judged = [line["validation_loss"] for line in log_of(trained(recipe)) if "validation_loss" in line]
    assert len(judged) == 3
    assert judged[-1] < 0.98 * judged[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_is_the_uninterrupted_one(
    recipe: str, trained: Callable[[str], Path], images: Path, model: Path, tmp_path: Path
) -> None:
    """Killed three steps past its checkpoint and resumed: every bit of the last checkpoint is the same."""
    out = tmp_path / trained(recipe).name
    given = arguments(recipe, images, model, out)
    training, _ = prepare(parsed_options(given))
    training.run(stop_after=8)
    for _ in range(3):
        training.train_step()  # lost, as by a kill
    assert main(given) == 2  # without --resume an earlier run is not overwritten
    assert main([*given, "--resume"]) == 0
    expected, facts = load_checkpoint(trained(recipe).with_name(out.name + ".training")) or ({}, {})
    got, _ = load_checkpoint(out.with_name(out.name + ".training")) or ({}, {})
    assert facts["step"] == STEPS
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_what_resuming_restores_matters(images: Path, model: Path, tmp_path: Path) -> None:
    """A negative control: with the optimizer's moments lost, the same steps end elsewhere."""
    ends = []
    for lost in (False, True):
        out = tmp_path / f"lost-{lost}.safetensors"
        given = arguments("lora", images, model, out)
        training, _ = prepare(parsed_options(given))
        training.run(stop_after=2)
        work = out.with_name(out.name + ".training")
        tensors, facts = load_checkpoint(work) or ({}, {})
        if lost:
            tensors = {name: t if name.startswith("weight/") else torch.zeros_like(t) for name, t in tensors.items()}
            save_checkpoint(work, facts["step"], tensors, facts)
        resumed, _ = prepare(parsed_options([*given, "--resume"]))
        resumed.run(stop_after=4)
        ends.append((load_checkpoint(work) or ({}, {}))[0])
    weights = [name for name in ends[0] if name.startswith("weight/")]
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in weights), "the moments were not read"


def test_resuming_under_other_settings_is_refused(
    trained: Callable[[str], Path], images: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run can't be half of one rank and half of another."""
    out = trained("lora")
    assert main(arguments("lora", images, model, out, "--resume", "--rank", "2")) == 2
    assert "rank=2: the run in lora.safetensors.training was started with 4" in capsys.readouterr().err


def test_a_lora_loads_in_plain_diffusers(trained: Callable[[str], Path], model: Path) -> None:
    """It changes the image, and at weight 0 it does not."""
    pipeline = plain(model)
    before = paint(pipeline)
    pipeline.load_lora_weights(str(trained("lora").parent), weight_name="lora.safetensors")
    after = paint(pipeline)
    assert np.abs(after - before).max() > 8
    pipeline.set_adapters(pipeline.get_active_adapters(), [0.0])
    assert np.abs(paint(pipeline) - before).max() <= 1


def test_every_layer_of_a_lora_is_loaded(images: Path, model: Path, tmp_path: Path) -> None:
    """Attention and convolutions together: diffusers drops layers whose names it does not expect, with a warning."""
    out = tmp_path / "mixed.safetensors"
    given = [*arguments("lora", images, model, out), "--targets", "to_q,to_out.0,conv1", "--steps", "2"]
    assert main(given) == 0
    learned, _ = load_checkpoint(out.with_name(out.name + ".training")) or ({}, {})
    pipeline = plain(model)
    pipeline.load_lora_weights(str(out.parent), weight_name=out.name, adapter_name="default")
    loaded = dict(pipeline.unet.named_parameters())
    names = [name.removeprefix("weight/") for name in learned if name.startswith("weight/")]
    assert any("conv1" in name for name in names)
    assert any("to_q" in name for name in names)
    assert {name for name in loaded if "lora_" in name} == set(names)
    for name in names:
        torch.testing.assert_close(loaded[name], learned[f"weight/{name}"], atol=1e-3, rtol=1e-3)


def test_a_loras_alpha_travels_with_it(images: Path, model: Path, tmp_path: Path) -> None:
    """Loaded by diffusers, the layers have the scale that they were trained with."""
    out = tmp_path / "scaled.safetensors"
    assert main([*arguments("lora", images, model, out), "--steps", "2", "--alpha", "12"]) == 0
    pipeline = plain(model)
    pipeline.load_lora_weights(str(out.parent), weight_name=out.name)
    scales = {layer.scaling["default_0"] for layer in pipeline.unet.modules() if hasattr(layer, "scaling")}
    assert scales == {3.0}


def test_a_new_word_loads_in_plain_diffusers(trained: Callable[[str], Path], model: Path) -> None:
    """Both its vectors; a prompt with it gives another image, one without it the same."""
    pipeline = plain(model)
    before, without = paint(pipeline, "a <x>"), paint(pipeline, "a b")
    pipeline.load_textual_inversion(str(trained("textual-inversion")))
    assert {"<x>", "<x>_1"} <= pipeline.tokenizer.get_vocab().keys()
    assert np.abs(paint(pipeline, "a <x>") - before).max() > 8
    assert np.array_equal(paint(pipeline, "a b"), without)


def test_only_the_new_word_is_learned(trained: Callable[[str], Path]) -> None:
    """The file holds its vectors and nothing else."""
    from safetensors.torch import load_file

    state = load_file(trained("textual-inversion"))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"<x>": (2, 32)}
    assert not torch.equal(state["<x>"][0], state["<x>"][1])  # from the same word, each went its own way


def test_a_controlnet_loads_in_plain_diffusers(trained: Callable[[str], Path], model: Path, images: Path) -> None:
    """Its control image changes the result, another one changes it otherwise, and scale 0 is without it."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipeline = plain(model)
    before = paint(pipeline)
    net = ControlNetModel.from_pretrained(str(trained("controlnet")), torch_dtype=torch.float32, use_safetensors=True)
    controlled = StableDiffusionControlNetPipeline(**pipeline.components, controlnet=net, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    first, second = (Image.open(images / f"{number}-control.png") for number in (0, 1))
    after = paint(controlled, image=first)
    assert np.abs(after - before).max() > 8
    assert np.abs(paint(controlled, image=second) - after).max() > 0
    assert np.abs(paint(controlled, image=first, controlnet_conditioning_scale=0.0) - before).max() <= 1


def test_a_light_controlnet_is_a_controlnet(images: Path, model: Path, tmp_path: Path) -> None:
    """Without attention, smaller, and still the encoder of its U-Net; at first it changes nothing."""
    from diffusers import ControlNetModel

    out = tmp_path / "light"
    training, recipe = prepare(parsed_options(arguments("controlnet", images, model, out, "--light")))
    del training
    recipe.save(out)
    light = ControlNetModel.from_pretrained(str(out), torch_dtype=torch.float32)
    assert not [name for name, _ in light.named_parameters() if "attentions" in name]
    down, middle = light(
        torch.randn(1, 4, 8, 8), 5, torch.randn(1, 24, 32), torch.rand(1, 3, 64, 64), return_dict=False
    )
    assert all(not part.any() for part in [*down, middle])


def test_a_sample_sheet_shows_before_and_after(images: Path, model: Path, tmp_path: Path) -> None:
    """A column a prompt; two rows that differ."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n\n")
    out = tmp_path / "x.safetensors"
    given = [*arguments("lora", images, model, out), "--steps", "6", "--validation-prompts", str(prompts)]
    assert main([*given, "--sample-every", "3"]) == 0
    names = sorted(path.name for path in (tmp_path / "x.safetensors.training").glob("*.png"))
    assert names == ["samples-000003.png", "samples-000006.png"]
    with Image.open(tmp_path / "x.safetensors.training" / names[-1]) as sheet:
        pixels = np.asarray(sheet).astype(int)
    assert np.abs(pixels[8:72, -136:] - pixels[80:144, -136:]).max() > 8


def test_an_unfinished_checkpoint_is_not_looked_at(tmp_path: Path) -> None:
    """A kill between the two files leaves tensors without facts: the one before it counts. Older ones go."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.tensor([float(step)])}, {})
    (tmp_path / "step-000003.json").unlink()
    tensors, facts = load_checkpoint(tmp_path) or ({}, {})
    assert (facts["step"], tensors["w"].item()) == (2, 2.0)
    assert not (tmp_path / "step-000001.safetensors").exists()
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_held_out_images_stay_held_out() -> None:
    """More images move none from the judges to the learners' side, except to make room."""
    examples = [Example(image=Path(f"{number}.png"), text="") for number in range(40)]
    learned_from, judged_by = hold_out(examples, share=0.1, most=32)
    assert len(judged_by) == 4
    assert not set(judged_by) & set(learned_from)
    assert hold_out(examples[::-1], share=0.1, most=32)[1] == judged_by
    assert set(hold_out(examples, share=0.2, most=32)[1]) > set(judged_by)


def test_the_target_is_that_of_the_schedule() -> None:
    """Noise or v, as diffusers' own schedulers define them; weights by their papers' equations, with mean 1."""
    from diffusers import DDPMScheduler

    latents, noise, timesteps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=kind)
        objective = Objective(scheduler, weighting=Weighting.MIN_SNR, gamma=5.0)
        noised = scheduler.add_noise(latents, noise, timesteps)
        torch.testing.assert_close(objective.noised(latents, noise, timesteps), noised)
        velocity = scheduler.get_velocity(latents, noise, timesteps)
        target = objective.target(latents, noise, timesteps)
        torch.testing.assert_close(target, noise if kind == "epsilon" else velocity)
        ratio = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        weights = torch.minimum(ratio, torch.tensor(5.0)) / (ratio if kind == "epsilon" else ratio + 1)
        torch.testing.assert_close(objective.weights(torch.arange(1000)), weights / weights.mean())
    with pytest.raises(InvalidRequest, match="sample"):
        Objective(DDPMScheduler(prediction_type="sample"))


def test_bad_input_is_one_line_with_a_remedy(
    images: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong, the value and what to do; exit status 2; nothing written."""
    out = tmp_path / "out.safetensors"

    def said(recipe: str, *more: str, data: Path = images, model: Path = model) -> str:
        assert main(arguments(recipe, data, model, out, *more)) == 2
        shown = capsys.readouterr().err
        assert len(shown.strip().splitlines()) == 1
        assert shown.startswith(f"calotype train {recipe}: ")
        assert not out.exists()
        return shown

    assert "has no metadata.jsonl" in said("lora", data=tmp_path)
    assert "--model='nowhere': is not a model; give demo" in said("lora", model=Path("nowhere"))
    assert "--targets='to_x': matches no layer" in said("lora", "--targets", "to_q,to_x")
    assert "'zebra': is 5 tokens" in said("textual-inversion", "--initialize-from", "zebra")
    assert "--token='<y>': does not occur in any caption" in said("textual-inversion", "--token", "<y>")
    assert "--token='a</w>': is not a new word" in said(
        "textual-inversion", "--token", "a</w>", data=images_with(tmp_path, images, text="a</w>")
    )
    assert "2 widths" in said("controlnet", "--embedding-channels", "4,4")
    assert "--device='abacus': is not available to torch" in said("lora", "--device", "abacus")
    assert "--validation-prompts" in said("lora", "--validation-prompts", str(tmp_path / "none.txt"))
    assert "metadata.jsonl:8 file_name='gone.png'" in said(
        "lora", data=images_with(tmp_path, images, file_name="gone.png")
    )
    assert "conditioning_file_name='gone.png'" in said(
        "controlnet", data=images_with(tmp_path, images, conditioning_file_name="gone.png")
    )
    assert "metadata.jsonl:8='{" in said("lora", data=images_with(tmp_path, images, text=7))
    assert "not an image" in said("lora", data=images_with(tmp_path, images, file_name="metadata.jsonl"))


def images_with(scratch: Path, images: Path, **changes: object) -> Path:
    """A copy of the images whose last line of metadata is changed."""
    folder = scratch / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(images, folder)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), **changes})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def plain(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, prompt: str = "a <x>", **options: Any) -> np.ndarray:
    """(64, 64, 3) int levels, from a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    made = pipeline(prompt, num_inference_steps=4, guidance_scale=3.0, generator=generator, **options)
    return np.asarray(made.images[0]).astype(int)
