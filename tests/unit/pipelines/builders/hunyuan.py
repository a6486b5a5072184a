"""HunyuanVideo."""

from __future__ import annotations

from typing import Any

import torch

from tests.models import byte_tokenizer
from tests.unit.pipelines import parts, text_encoders
from tests.unit.pipelines.parts import noisy


def hunyuan_video() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=parts.WIDTH,
        pooled_projection_dim=parts.WIDTH,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return noisy(
        HunyuanVideoPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=parts.flow_euler(shift=7.0),
            text_encoder=text_encoders.llama(),
            tokenizer=parts.qwen_tokenizer(),
            text_encoder_2=text_encoders.clip(projection=False),
            tokenizer_2=byte_tokenizer(),
        )
    )


def hunyuan_video_15() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer

    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=parts.WIDTH,
        text_embed_2_dim=parts.WIDTH,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipeline = HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=parts.flow_euler(shift=7.0),
        text_encoder=text_encoders.qwen_vl().model.language_model,
        tokenizer=parts.qwen_tokenizer(),
        text_encoder_2=text_encoders.t5(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(),
    )
    pipeline.tokenizer_max_length = 256  # shorter than the published one's, for time
    return noisy(pipeline)
