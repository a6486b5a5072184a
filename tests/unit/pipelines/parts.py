"""Tiny networks, tokenizers and schedulers of the pipelines: real classes, random weights."""

from __future__ import annotations

from typing import Any

import torch

WIDTH = 32  # of text encoders


def noisy(pipeline: Any, *, seed: int = 0) -> Any:
    """Fill what is zero when fresh with noise: zeros would hide that calls were merged wrongly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in pipeline.components.values():
            if not isinstance(part, torch.nn.Module):
                continue
            part.eval()
            for parameter in part.parameters():
                if parameter.is_floating_point() and not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return pipeline


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


def qwen_vl() -> Any:
    """Qwen2.5-VL with a small language model and a small vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(1)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": WIDTH,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1_000_000.0},
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 2048,
            },
            vision_config={
                "depth": 2,
                "hidden_size": WIDTH,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
                "patch_size": 14,
                "fullatt_block_indexes": [1],
            },
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            bos_token_id=token("<|endoftext|>"),
            eos_token_id=token("<|endoftext|>"),
        )
    )


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
