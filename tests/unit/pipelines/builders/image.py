"""Other image pipelines."""

from __future__ import annotations

from typing import Any

import torch

from tests import family_models
from tests.models import byte_tokenizer
from tests.unit.pipelines import parts, text_encoders
from tests.unit.pipelines.builders import flux2
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
            text_encoder=text_encoders.qwen3(),
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
            text_encoder=text_encoders.t5(),
            tokenizer=family_models.t5_tokenizer(),
        )
    )


def krea2() -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=parts.WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    return noisy(
        Krea2Pipeline(
            transformer=transformer,
            vae=parts.qwen_vae(),
            scheduler=parts.flow_euler(use_dynamic_shifting=True),
            text_encoder=text_encoders.qwen3_vl(),
            tokenizer=parts.qwen_tokenizer(),
            text_encoder_select_layers=(0, 1, 2),
        )
    )


def ernie_image() -> Any:
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=parts.WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    return noisy(
        ErnieImagePipeline(
            transformer=transformer,
            vae=flux2.vae(),
            scheduler=parts.flow_euler(),
            text_encoder=text_encoders.mistral3(layers=2).model,
            tokenizer=parts.qwen_tokenizer(),
        )
    )


def sana() -> Any:
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=parts.WIDTH,
        sample_size=16,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    return noisy(
        SanaPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=parts.flow_euler(shift=7.0),
            text_encoder=text_encoders.gemma2(),
            tokenizer=parts.qwen_tokenizer(),
        )
    )


def hidream() -> Any:
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    torch.manual_seed(0)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[parts.WIDTH, parts.WIDTH],
        text_emb_dim=2 * parts.WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    pipeline = HiDreamImagePipeline(
        transformer=transformer,
        vae=family_models._vae(16),
        scheduler=parts.flow_euler(),
        text_encoder=text_encoders.clip(projection=True),
        tokenizer=byte_tokenizer(),
        text_encoder_2=text_encoders.clip(projection=True),
        tokenizer_2=byte_tokenizer(),
        text_encoder_3=text_encoders.t5(),
        tokenizer_3=family_models.t5_tokenizer(),
        text_encoder_4=text_encoders.llama(layers=2, head=True),
        tokenizer_4=parts.qwen_tokenizer(),
    )
    pipeline.default_sample_size = 8
    return noisy(pipeline)


def dit() -> Any:
    """It takes labels of classes instead of a prompt."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        norm_num_groups=4,
    )
    return noisy(DiTPipeline(transformer=transformer, vae=family_models._vae(4), scheduler=DDIMScheduler()))
