"""Tiny text encoders of the pipelines: real classes, random weights."""

from __future__ import annotations

from typing import Any

import torch

from tests import family_models
from tests.models import byte_tokenizer
from tests.unit.pipelines import parts
from tests.unit.pipelines.parts import WIDTH


def qwen_vl() -> Any:
    """Qwen2.5-VL with a small language model and a small vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = parts.qwen_tokenizer()
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
            vocab_size=len(parts.qwen_tokenizer()),
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=256,
        )
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


def mistral3(*, layers: int) -> Any:
    """Mistral 3 with a small vision tower; pipelines read hidden states of up to `layers`."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(9)
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": len(parts.qwen_tokenizer()),
                "hidden_size": WIDTH,
                "intermediate_size": 32,
                "max_position_embeddings": 1024,
                "num_attention_heads": 2,
                "num_hidden_layers": layers,
                "num_key_value_heads": 2,
                "sliding_window": None,
                "head_dim": 16,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": WIDTH,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": 28,
                "patch_size": 14,
            },
        )
    )


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    torch.manual_seed(10)
    return Qwen3VLModel(
        Qwen3VLConfig(
            text_config={
                "hidden_size": WIDTH,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vocab_size": len(parts.qwen_tokenizer()),
                "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1_000_000.0},
                "pad_token_id": None,
            },
            vision_config={
                "depth": 2,
                "hidden_size": WIDTH,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
                "deepstack_visual_indexes": [0, 1],
            },
        )
    )


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(11)
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(parts.qwen_tokenizer()),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            pad_token_id=0,
        )
    )


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(12)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={
                "vocab_size": len(parts.qwen_tokenizer()),
                "hidden_size": WIDTH,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "pad_token_id": 0,
            },
            vision_config={
                "hidden_size": WIDTH,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
            image_token_index=1,
        )
    )


def llama(*, layers: int = 4, head: bool = False) -> Any:
    """With `head`, as a language model that gives logits too."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    torch.manual_seed(13)
    config = LlamaConfig(
        vocab_size=len(parts.qwen_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config) if head else LlamaModel(config)


def clip(*, projection: bool) -> Any:
    """For prompts of up to 128 tokens; pipelines pad them to 77 or 128."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = byte_tokenizer()
    torch.manual_seed(14)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
