"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.pipelines import parts, text_encoders
from tests.unit.pipelines.parts import noisy


def _qwen_image(kind: str, **more: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=parts.WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    pipeline = getattr(diffusers, kind)(
        transformer=transformer,
        vae=parts.qwen_vae(),
        scheduler=parts.flow_euler(),
        text_encoder=text_encoders.qwen_vl(),
        tokenizer=parts.qwen_tokenizer(),
        **more,
    )
    pipeline.default_sample_size = 8
    return noisy(pipeline)


def qwen_image() -> Any:
    return _qwen_image("QwenImagePipeline")


def qwen_image_to_image() -> Any:
    return _qwen_image("QwenImageImg2ImgPipeline")


def qwen_inpaint() -> Any:
    return _qwen_image("QwenImageInpaintPipeline")


def qwen_edit() -> Any:
    return _qwen_image("QwenImageEditPipeline", processor=parts.qwen_processor())


def qwen_edit_plus() -> Any:
    return _qwen_image("QwenImageEditPlusPipeline", processor=parts.qwen_processor())


def qwen_controlnet() -> Any:
    from diffusers import QwenImageControlNetModel

    torch.manual_seed(1)
    controlnet = QwenImageControlNetModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=parts.WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    return _qwen_image("QwenImageControlNetPipeline", controlnet=controlnet)
