"""Tiny random-weight pipelines of the larger families, built from config: real parts, no hub, a second to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models import NATIVE_SIDE, PROMPT_TOKENS, byte_tokenizer

_WIDTH = 32  # of every text encoder but T5


def write(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_sdxl(*, seed: int = 0) -> Any:
    """Two text encoders, pooled text and sizes as added conditioning."""
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(seed)
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip(projection=False),
        text_encoder_2=_clip(projection=True),
        tokenizer=byte_tokenizer(),
        tokenizer_2=byte_tokenizer(),
        unet=_sdxl_unet(text=2 * _WIDTH, added=_WIDTH + 6 * 8),
        scheduler=_euler(),
        force_zeros_for_empty_prompt=True,
    )


def tiny_refiner(*, seed: int = 1) -> Any:
    """Only the second text encoder, and an aesthetic score instead of the target size."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    torch.manual_seed(seed)
    return StableDiffusionXLImg2ImgPipeline(
        vae=_vae(4),
        text_encoder=None,
        text_encoder_2=_clip(projection=True),
        tokenizer=None,
        tokenizer_2=byte_tokenizer(),
        unet=_sdxl_unet(text=_WIDTH, added=_WIDTH + 5 * 8),
        scheduler=_euler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def tiny_sd3(*, seed: int = 0, t5: bool = True) -> Any:
    """Two CLIPs, T5 or none, and a transformer over 16 channels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=NATIVE_SIDE // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * _WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=2 * _WIDTH,
        pos_embed_max_size=24,
    )
    _louder(transformer.proj_out, transformer.norm_out.linear)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16),
        text_encoder=_clip(projection=True),
        tokenizer=byte_tokenizer(),
        text_encoder_2=_clip(projection=True),
        tokenizer_2=byte_tokenizer(),
        text_encoder_3=_t5(2 * _WIDTH) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def tiny_flux(*, seed: int = 0, guidance: bool = True) -> Any:
    """CLIP's pooled vector, T5's sequence, latents in patches; with a guidance input (dev) or without (schnell)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance,
    )
    _louder(transformer.proj_out, transformer.norm_out.linear)
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=_vae(16),
        text_encoder=_clip(projection=False),
        tokenizer=byte_tokenizer(),
        text_encoder_2=_t5(_WIDTH),
        tokenizer_2=t5_tokenizer(),
    )


def t5_tokenizer() -> Any:
    """A T5 tokenizer whose tokens are single letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    return T5Tokenizer(vocab=[(piece, 0.0 if index < 3 else -1.0) for index, piece in enumerate(pieces)], extra_ids=0)


def _euler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def _sdxl_unet(*, text: int, added: int) -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=NATIVE_SIDE // 8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text,
        attention_head_dim=8,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=added,
    )
    _louder(unet.conv_out, unet.add_embedding.linear_2)
    return unet


def _vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    shift = {"shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False} if channels == 16 else {}
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        **shift,
    )
    _louder(vae.decoder.conv_out)
    return vae


def _clip(*, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = byte_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_TOKENS,
        projection_dim=_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )


def _louder(*layers: Any) -> None:
    """Random weights predict next to nothing, which would hide errors."""
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(3)
