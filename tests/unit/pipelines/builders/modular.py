"""Modular pipelines: blocks, with the networks of the pipeline classes."""

from __future__ import annotations

from typing import Any

from tests.unit.pipelines.builders.flux1 import flux
from tests.unit.pipelines.builders.qwen import qwen_image
from tests.unit.pipelines.builders.sd import sdxl


def _of_blocks(kind: str, pipeline: Any) -> Any:
    """Blocks of diffusers with the parts of a pipeline."""
    import diffusers

    made = getattr(diffusers, kind)().init_pipeline()
    parts = {name: part for name, part in pipeline.components.items() if name in made.component_names}
    made.update_components(**{name: part for name, part in parts.items() if part is not None})
    return made


def modular_flux() -> Any:
    return _of_blocks("FluxAutoBlocks", flux())


def modular_sdxl() -> Any:
    return _of_blocks("StableDiffusionXLAutoBlocks", sdxl())


def modular_qwen() -> Any:
    return _of_blocks("QwenImageAutoBlocks", qwen_image())
