"""Stable Diffusion 1.x, XL and 3 as pipelines."""

from __future__ import annotations

from typing import Any

import torch

from tests.family_models import tiny_sd3, tiny_sdxl
from tests.models import tiny_pipeline
from tests.unit.pipelines import parts
from tests.unit.pipelines.parts import noisy


def stable_diffusion() -> Any:
    return noisy(tiny_pipeline())


def _of_sd(kind: str, **more: Any) -> Any:
    import diffusers

    return noisy(getattr(diffusers, kind)(**tiny_pipeline().components, **more, requires_safety_checker=False))


def sd_image_to_image() -> Any:
    return _of_sd("StableDiffusionImg2ImgPipeline")


def sd_inpaint() -> Any:
    return _of_sd("StableDiffusionInpaintPipeline")


def sd_controlnet() -> Any:
    from diffusers import ControlNetModel

    torch.manual_seed(2)
    unet = tiny_pipeline().unet
    return _of_sd(
        "StableDiffusionControlNetPipeline",
        controlnet=ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16)),
    )


def sdxl() -> Any:
    return noisy(tiny_sdxl())


def sdxl_control(seed: int) -> Any:
    from diffusers import ControlNetModel

    torch.manual_seed(3 + seed)
    net = ControlNetModel.from_unet(tiny_sdxl().unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    return parts.filled(net, torch.Generator().manual_seed(seed))


def sd3() -> Any:
    return noisy(tiny_sd3())


def sdxl_half() -> Any:
    """SDXL in float16, whose autoencoder overflows in it."""
    pipeline = sdxl()
    pipeline.vae.register_to_config(force_upcast=True)
    return pipeline.to(torch.float16)


def sd_perturbed_attention() -> Any:
    return _of_sd("StableDiffusionPAGPipeline", pag_applied_layers=["up_blocks.0"])
