"""Tiny networks, tokenizers and schedulers of the pipelines: real classes, random weights."""

from __future__ import annotations

from typing import Any

import torch

from tests import family_models

WIDTH = 32  # of text encoders


def noisy(pipeline: Any, *, seed: int = 0) -> Any:
    """Fill what is zero when fresh with noise: zeros would hide that calls were merged wrongly."""
    generator = torch.Generator().manual_seed(seed)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            filled(part, generator)
    return pipeline


def filled(network: Any, generator: torch.Generator) -> Any:
    """The same for one network."""
    with torch.no_grad():
        for parameter in network.eval().parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network


def qwen_tokenizer() -> Any:
    """A byte-level tokenizer with Qwen's special tokens."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(bytes_to_unicode().values())},
        merges=[],
        model_max_length=512,
        additional_special_tokens=special,
    )
    tokenizer.chat_template = template
    return tokenizer


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(2)
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def flow_euler(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})


def qwen_processor() -> Any:
    """Images as a few patches for Qwen2.5-VL, and no videos: their processor wants torchvision."""
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

    class ImagesOnly(Qwen2VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    tokenizer = qwen_tokenizer()
    return ImagesOnly(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def wan_vae(z_dim: int = 4) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(7)
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=z_dim,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    )


def wan_transformer(seed: int = 0, **options: Any) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": WIDTH,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            **options,
        }
    )


def vision(*, projection: bool = True, side: int = 32) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    torch.manual_seed(8)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=side // 4,
    )
    return CLIPVisionModelWithProjection(config) if projection else CLIPVisionModel(config)


def image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32}, do_resize=True)


def t5_tokenizer(length: int) -> Any:
    """One that says how long prompts may be, as published ones do."""
    tokenizer = family_models.t5_tokenizer()
    tokenizer.model_max_length = length
    return tokenizer
