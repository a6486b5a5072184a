"""Tiny Stable Diffusion folders with random weights, built from config: real parts, no hub, a second to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PROMPT_TOKENS = 24  # positions of the tiny text encoder, start and end markers included
NATIVE_SIDE = 64  # pixels


def tiny_pipeline(*, seed: int = 0, prediction_type: str = "epsilon", **unet_overrides: Any) -> Any:
    """A `StableDiffusionPipeline` of about 0.5M parameters: 64x64 pixels, 8x8 latents.

    Random weights predict next to nothing, which would hide errors: a wrong timestep would change no pixel. So the
    network's last layer is scaled up until its output matters.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        **{
            "sample_size": NATIVE_SIDE // 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
            **unet_overrides,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        unet.conv_out.weight.mul_(3)
        vae.decoder.conv_out.weight.mul_(3)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_tiny_sd(folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Save a tiny pipeline as a diffusers folder with safetensors weights, and return the folder."""
    tiny_pipeline(seed=seed, **options).save_pretrained(folder, safe_serialization=True)
    return folder


def byte_tokenizer() -> Any:
    """A CLIP tokenizer whose tokens are single letters: no merges, so a prompt's length is easy to know."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=PROMPT_TOKENS
    )
