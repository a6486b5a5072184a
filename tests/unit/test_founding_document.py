"""Runs every Python example of the founding document, as written but for its import lines, on the bundled model.

The examples follow one another as a reader would type them. Import lines point at Calotype, "cuda" is this machine's
CPU, and the hub's models are the bundled one, for tests have no hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calotype_worker import DiffusionModel, GenerationConfig, NoiseScheduler, TextEncoder, UNetModel
from calotype_worker.models import controlnet_load, demo_folder, registry
from tests.models import sample_image

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "founding-document.md"
IMPORTS = {
    "from modules.diffusion_generation import": "from calotype_worker import",
    "from diffusers import": "from calotype_worker.inprocess.compat import",
    '"cuda"': '"cpu"',
}
SMALL = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 1}


def examples() -> list[tuple[str, str]]:
    """Each Python block with the heading above it."""
    found, heading = [], ""
    for match in re.finditer(
        r"^#+ (?P<heading>[^\n]+)$|^```python\n(?P<code>.*?)^```", DOCUMENT.read_text(), re.M | re.S
    ):
        heading = match["heading"] or heading
        if match["code"]:
            found.append((heading, match["code"]))
    return found


def before(names: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What an example takes for granted."""
    return {
        "Inpainting": lambda: {
            "image": sample_image(1, 128, 128),
            "original_image": sample_image(1, 128, 128),
            "create_mask": lambda image: np.pad(np.ones((64, 64)), 32),
        },
        "1. Noise Schedule": lambda: {"NoiseScheduler": NoiseScheduler},
        "2. U-Net Prediction": lambda: {
            "unet": UNetModel(names["model"]),
            "noisy_image": torch.randn(4, 16, 16),
            "timestep": 500,
            "text_embedding": TextEncoder(names["model"]).encode("a red circle"),
        },
        "3. Classifier-Free Guidance": lambda: {
            "unconditional_noise": torch.zeros(4, 16, 16),
            "conditional_noise": names["predicted_noise"],
            "guidance_scale": 7.5,
        },
        "Seed": lambda: {"config": GenerationConfig(prompt="a red circle", **SMALL)},
        "ControlNet": lambda: {"edge_map": sample_image(2, 128, 128), "prompt": "a red circle"},
        "Hardware Acceleration": lambda: {"model": names["model"]},
    }


def after(names: dict[str, Any]) -> dict[str, Callable[[], bool]]:
    """What an example must have brought about."""
    return {
        "Basic Text-to-Image Generation": lambda: (
            names["result"].image_data.shape == (512, 512, 3)
            and names["result"].steps_taken == 50
            and names["result"].image_data.std() > 1
        ),
        "Using the Pipeline": lambda: [made.config.seed for made in names["results"]] == [123, 124, 125, 126],
        "Quality Presets": lambda: (
            [
                (config.num_inference_steps, config.guidance_scale)
                for config in (names["fast_config"], names["balanced_config"], names["high_config"])
            ]
            == [(20, 7.0), (50, 7.5), (100, 8.0)]
        ),
        "Image-to-Image Transformation": lambda: (
            names["result"].image_data.shape == (64, 96, 3) and names["result"].steps_taken == 37
        ),
        "Inpainting": lambda: np.array_equal(names["result"].image_data[:32], sample_image(1, 128, 128)[:32]),
        "1. Noise Schedule": lambda: len(names["scheduler"].timesteps) == 1000,
        "2. U-Net Prediction": lambda: names["predicted_noise"].shape == (4, 16, 16),
        "3. Classifier-Free Guidance": lambda: torch.equal(names["guided_noise"], 7.5 * names["predicted_noise"]),
        "Using Stable Diffusion (diffusers library)": lambda: names["image"].size == (128, 128),
        "Using Stable Diffusion XL": lambda: names["image"].size == (128, 128),
        "Prompt Weights (Advanced)": lambda: draws(names["prompt"]),
        "Negative Prompts": lambda: draws("a red circle", negative_prompt=names["negative_prompt"]),
        "Examples": lambda: draws(names["prompt"]),
        "Seed": lambda: names["result"].config.seed == 45,
        "ControlNet": lambda: names["image"].size == (128, 128),
        "LoRA (Low-Rank Adaptation)": lambda: names["image"].size == (128, 128),
        "Textual Inversion": lambda: draws(names["prompt"]),
        "Memory Optimization": lambda: names["pipe"].model.step_model.device.type == "cpu",
        "Batch Generation": lambda: len(names["images"]) == 3,
    }


def draws(prompt: str, **fields: Any) -> bool:
    with DiffusionModel() as model:
        made = model.generate(GenerationConfig(prompt=prompt, **{**SMALL, **fields}))
    return made.image_data.shape == (64, 64, 3)


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub ids and placeholder paths lead to the bundled model and to adapters made for it."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    folder = demo_folder()
    net = ControlNetModel.from_unet(
        UNet2DConditionModel.from_pretrained(folder / "unet"), conditioning_embedding_out_channels=(8, 8, 16, 16)
    )
    net.save_pretrained(tmp_path / "control")
    known = {
        "stabilityai/stable-diffusion-2-1": folder,
        "stabilityai/stable-diffusion-xl-base-1.0": folder,
        "runwayml/stable-diffusion-v1-5": folder,
        "path/to/custom_model.safetensors": folder,
        "model_id": folder,
        "lllyasviel/sd-controlnet-canny": tmp_path / "control",
    }
    resolve, load = registry.resolve_source, controlnet_load.load_controlnets
    monkeypatch.setattr(
        registry, "resolve_source", lambda name, source: resolve(name, str(known[source]) if source else None)
    )
    monkeypatch.setattr(
        "calotype_worker.models.unet.load_controlnets",
        lambda sources, **options: load({n: str(known.get(s, s)) for n, s in sources.items()}, **options),
    )
    monkeypatch.chdir(tmp_path)
    Image.fromarray(sample_image(3, 96, 64)).save("source.jpg")
    write_lora(tmp_path / "lora_path")


def write_lora(file: Path) -> None:
    """A LoRA for the bundled model's network under the very name that the document uses."""
    from safetensors.torch import save_file

    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    from diffusers import UNet2DConditionModel

    layer = UNet2DConditionModel.from_pretrained(demo_folder() / "unet").get_submodule(path.removeprefix("unet."))
    rank = 2
    state = {
        f"{path}.lora_A.weight": torch.randn(rank, layer.in_features),
        f"{path}.lora_B.weight": torch.randn(layer.out_features, rank),
    }
    save_file(state, f"{file}.safetensors")


def test_every_example_runs(no_hub: None) -> None:
    """Each of them, in order, and each does what its comments say."""
    names: dict[str, Any] = {}
    ran = []
    for heading, code in examples():
        given, wanted = before(names).get(heading), after(names).get(heading)
        if given is not None:
            names |= given()
        written = code
        for old, new in IMPORTS.items():
            written = written.replace(old, new)
        written = written.replace('"lora_path"', '"lora_path.safetensors"')
        exec(compile(written, f"{DOCUMENT.name}: {heading}", "exec"), names)
        if wanted is not None:
            assert wanted(), heading
        ran.append(heading)
    assert set(after(names)) | set(before(names)) <= set(ran), "the document lost an example"
    assert len(ran) == DOCUMENT.read_text().count("```python")
