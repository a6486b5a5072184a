"""Tiny pipelines of many classes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.family_models import tiny_flux
from tests.models import tiny_pipeline
from tests.unit.pipelines import parts
from tests.unit.pipelines.parts import noisy
from tests.video_and_mesh_models import tiny_shap_e


def stable_diffusion() -> Any:
    return noisy(tiny_pipeline())


def flux() -> Any:
    return noisy(tiny_flux())


def qwen_image() -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=parts.WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    pipeline = QwenImagePipeline(
        transformer=transformer,
        vae=parts.qwen_vae(),
        scheduler=parts.flow_euler(),
        text_encoder=parts.qwen_vl(),
        tokenizer=parts.qwen_tokenizer(),
    )
    pipeline.default_sample_size = 8
    return noisy(pipeline)


def shap_e(*, solid: bool = True) -> Any:
    """Views of few samples on each ray, and meshes of a coarse grid: those of the defaults take minutes."""
    pipeline = tiny_shap_e(solid=solid)
    renderer = pipeline.shap_e_renderer
    renderer.decode_to_image = functools.partial(renderer.decode_to_image, n_coarse_samples=2, n_fine_samples=4)
    renderer.decode_to_mesh = functools.partial(renderer.decode_to_mesh, grid_size=20)
    return pipeline
