"""Other image pipelines."""

from __future__ import annotations

from typing import Any

import torch

from tests import family_models
from tests.unit.pipelines import parts
from tests.unit.pipelines.parts import noisy


def _z_image(kind: str) -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=parts.WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("pad_token"):
                torch.nn.init.normal_(parameter)
    return noisy(
        getattr(diffusers, kind)(
            transformer=transformer,
            vae=family_models._vae(16),
            scheduler=parts.flow_euler(),
            text_encoder=parts.qwen3(),
            tokenizer=parts.qwen_tokenizer(),
        )
    )


def z_image() -> Any:
    return _z_image("ZImagePipeline")


def z_image_to_image() -> Any:
    return _z_image("ZImageImg2ImgPipeline")


def pixart_sigma() -> Any:
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=parts.WIDTH,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        use_additional_conditions=False,
    )
    return noisy(
        PixArtSigmaPipeline(
            transformer=transformer,
            vae=family_models._vae(4),
            scheduler=DDIMScheduler(),
            text_encoder=parts.t5(),
            tokenizer=family_models.t5_tokenizer(),
        )
    )
