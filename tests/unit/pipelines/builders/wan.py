"""Wan."""

from __future__ import annotations

from typing import Any

from tests import family_models
from tests.unit.pipelines import parts, text_encoders
from tests.unit.pipelines.parts import noisy


def wan() -> Any:
    from diffusers import WanPipeline

    return noisy(
        WanPipeline(
            transformer=parts.wan_transformer(),
            vae=parts.wan_vae(),
            scheduler=parts.flow_euler(shift=7.0),
            text_encoder=text_encoders.umt5(),
            tokenizer=family_models.t5_tokenizer(),
        )
    )


def wan_two_transformers() -> Any:
    from diffusers import WanPipeline

    return noisy(
        WanPipeline(
            transformer=parts.wan_transformer(),
            transformer_2=parts.wan_transformer(1),
            vae=parts.wan_vae(),
            scheduler=parts.flow_euler(shift=7.0),
            text_encoder=text_encoders.umt5(),
            tokenizer=family_models.t5_tokenizer(),
            boundary_ratio=0.875,
        )
    )


def wan_image_to_video() -> Any:
    from diffusers import WanImageToVideoPipeline

    return noisy(
        WanImageToVideoPipeline(
            transformer=parts.wan_transformer(in_channels=12, image_dim=parts.WIDTH),
            vae=parts.wan_vae(),
            scheduler=parts.flow_euler(shift=7.0),
            text_encoder=text_encoders.umt5(),
            tokenizer=family_models.t5_tokenizer(),
            image_encoder=parts.vision(projection=False),
            image_processor=parts.image_processor(),
            transformer_2=None,
        )
    )
