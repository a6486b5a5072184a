"""Networks of the shape of Stable Diffusion 1.5 and XL with random weights: as fast as the real ones, and no hub.

    python benchmarks/shapes.py sd15 FOLDER [--dtype bfloat16]      # 860M parameters, 512x512
    python benchmarks/shapes.py sdxl FOLDER                         # 2.6B parameters, 1024x1024
    python benchmarks/throughput.py --model sd15=FOLDER --device cuda:0

A step's time does not depend on what the weights are. The tokenizer knows single letters only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer() -> Any:
    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def text_config(hidden: int, layers: int, heads: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        bos_token_id=512,  # of the tokenizer above
        eos_token_id=513,
        **more,
    )


def vae(scaling_factor: float) -> Any:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=scaling_factor,
    )


def sd15() -> Any:
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8
    )  # the defaults are its own
    return StableDiffusionPipeline(
        vae=vae(0.18215),
        text_encoder=CLIPTextModel(text_config(768, 12, 12)),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=vae(0.13025),
        text_encoder=CLIPTextModel(text_config(768, 12, 12)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(1280, 32, 20, hidden_act="gelu", projection_dim=1280)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["sd15", "sdxl"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    pipeline = {"sd15": sd15, "sdxl": sdxl}[options.shape]()
    pipeline.to(getattr(torch, options.dtype)).save_pretrained(options.folder, safe_serialization=True)
    count = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    print(f"{options.folder}: a network of {count / 1e6:.0f}M parameters")


if __name__ == "__main__":
    main()
