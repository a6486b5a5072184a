"""Flux, Flux 2 and Chroma."""

from __future__ import annotations

from typing import Any

import torch

from tests import family_models
from tests.family_models import tiny_flux
from tests.unit.pipelines import parts, text_encoders
from tests.unit.pipelines.parts import noisy


def flux() -> Any:
    return noisy(tiny_flux())


def _of_flux(kind: str, **more: Any) -> Any:
    import diffusers

    components = {name: part for name, part in tiny_flux().components.items() if part is not None}
    return noisy(getattr(diffusers, kind)(**components, **more))


def flux_image_to_image() -> Any:
    return _of_flux("FluxImg2ImgPipeline")


def flux_kontext() -> Any:
    return _of_flux("FluxKontextPipeline")


def flux_control(seed: int) -> Any:
    from diffusers import FluxControlNetModel

    torch.manual_seed(3 + seed)
    net = FluxControlNetModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        axes_dims_rope=[4, 6, 6],
        guidance_embeds=True,
    )
    return parts.filled(net, torch.Generator().manual_seed(seed))


def flux_controlnet() -> Any:
    return _of_flux("FluxControlNetPipeline", controlnet=flux_control(0))


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipeline = ChromaPipeline(
        transformer=transformer,
        vae=family_models._vae(16),
        scheduler=parts.flow_euler(),
        text_encoder=text_encoders.t5(),
        tokenizer=family_models.t5_tokenizer(),
    )
    pipeline.default_sample_size = 8
    return noisy(pipeline)
