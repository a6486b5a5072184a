"""Writes a training's result as a Stable Diffusion folder in fp16 safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from calotype_train.demo.denoiser import SIZES, scheduler
from calotype_train.demo.tokenizer import save_tokenizer

DESCRIPTION = "Calotype's bundled demo: one or a few colored shapes on a plain background, 128x128"


def export(folder: Path, *, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any, notes: dict[str, Any]) -> None:
    """Replace `folder` by the model, whole or not at all. `notes` goes into its calotype.json."""
    from diffusers import StableDiffusionPipeline  # noqa: PLC0415

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(scratch, safe_serialization=True)
    save_tokenizer(tokenizer, scratch / "tokenizer")
    for config in scratch.glob("*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)  # do not publish the path used during training
        config.write_text(json.dumps(values, indent=2) + "\n")
    for file in scratch.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes files readable by their owner only, but an installed model has others
    own = {
        "description": DESCRIPTION,
        "native_sizes": [list(size) for size in SIZES],
        "recommended": {"num_inference_steps": 20, "guidance_scale": 5.0, "sampler": "ddim"},
        **notes,
    }
    (scratch / "calotype.json").write_text(json.dumps(own, indent=2) + "\n")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
