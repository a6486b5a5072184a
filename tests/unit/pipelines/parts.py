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


def qwen3(*, layers: int = 4) -> Any:
    """Qwen3, of which pipelines read hidden states."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(4)
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=len(qwen_tokenizer()),
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=256,
        )
    )


def qwen_processor() -> Any:
    """Images as patches for Qwen2.5-VL, of few of them."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=qwen_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=qwen_tokenizer().chat_template,
    )


def umt5() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(5)
    tokenizer = family_models.t5_tokenizer()
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )


def t5(width: int = WIDTH) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(6)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(family_models.t5_tokenizer()), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        )
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
