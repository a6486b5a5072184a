"""Flux 2."""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.pipelines import parts, text_encoders
from tests.unit.pipelines.parts import noisy


def _transformer(*, guidance: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * parts.WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(1)
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def flux2_klein() -> Any:
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline(
        transformer=_transformer(guidance=False),
        vae=vae(),
        scheduler=parts.flow_euler(),
        text_encoder=text_encoders.qwen3(layers=28),
        tokenizer=parts.qwen_tokenizer(),
        is_distilled=False,
    )
    pipeline.default_sample_size = 8
    return noisy(pipeline)


def flux2() -> Any:
    from diffusers import Flux2Pipeline

    pipeline = Flux2Pipeline(
        transformer=_transformer(guidance=True),
        vae=vae(),
        scheduler=parts.flow_euler(),
        text_encoder=text_encoders.mistral3(layers=31),  # it reads the states of layers 10, 20 and 30
        tokenizer=parts.qwen_tokenizer(),
    )
    pipeline.default_sample_size = 8
    return noisy(pipeline)
