"""Tiny models in the layouts in which models are published, and images of them by plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine, GenerationRequest
from tests import family_models as tiny
from tests.models import tiny_pipeline


def write_with(folder: Path, scheduler: Any, *, sdxl: bool = False) -> Path:
    """A Stable Diffusion folder with this scheduler."""
    pipeline = tiny.tiny_sdxl() if sdxl else tiny_pipeline()
    pipeline.scheduler = scheduler
    return tiny.write(pipeline, folder)


def request(model: Any, **changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "request_id": "r",
        "prompt": "an image",
        "width": 64,
        "height": 64,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "seed": 1,
        "sampler": SamplerType(model.card.samplers[0]),
    }
    return GenerationRequest(**{**values, **changes})


def draw(model: Any, **changes: Any) -> np.ndarray:
    """One image by the engine, of the model's first sampler: int (H, W, 3)."""
    return draw_all(model, [request(model, **changes)])[0]


def draw_all(model: Any, requests: list[GenerationRequest]) -> list[np.ndarray]:
    engine = Engine(model)
    engine.start()
    try:
        return [future.result(120).image.astype(int) for future in [engine.submit(own) for own in requests]]
    finally:
        engine.stop()


def plain(folder: Path, *, pipeline: Any = None, **arguments: Any) -> np.ndarray:
    """The same image by diffusers' own pipeline, as it loads it."""
    import diffusers

    if pipeline is None:
        options = {} if "xl" in folder.name else {"safety_checker": None}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    values: dict[str, Any] = {"prompt": "an image", "num_inference_steps": 5, "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(1)
    made = pipeline(**{**values, **arguments}, width=64, height=64, generator=generator).images[0]
    return np.asarray(made).astype(int)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """Largest difference, of 255."""
    return int(np.abs(one - other).max())
