"""Tiny random-weight pipelines of the larger families, built from config: real parts, no hub, a second to make."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tests.models import NATIVE_SIDE, PROMPT_TOKENS, byte_tokenizer

_WIDTH = 32  # of every text encoder but T5


def write(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_sdxl(*, seed: int = 0, second: int = _WIDTH, layers: int = 2, **unet_overrides: Any) -> Any:
    """Two text encoders, pooled text and sizes as added conditioning.

    The second encoder is `second` wide and `layers` deep.
    """
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(seed)
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip(projection=False),
        text_encoder_2=_clip(projection=True, width=second, layers=layers),
        tokenizer=byte_tokenizer(),
        tokenizer_2=byte_tokenizer(),
        unet=_sdxl_unet(text=_WIDTH + second, added=second + 6 * 8, **unet_overrides),
        scheduler=_euler(),
        force_zeros_for_empty_prompt=True,
    )


def tiny_refiner(*, seed: int = 1, layers: int = 2) -> Any:
    """Only the second text encoder, and an aesthetic score instead of the target size."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    torch.manual_seed(seed)
    return StableDiffusionXLImg2ImgPipeline(
        vae=_vae(4),
        text_encoder=None,
        text_encoder_2=_clip(projection=True, layers=layers),
        tokenizer=None,
        tokenizer_2=byte_tokenizer(),
        unet=_sdxl_unet(text=_WIDTH, added=_WIDTH + 5 * 8),
        scheduler=_euler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def tiny_sd3(*, seed: int = 0, t5: bool = True, second: int = _WIDTH, layers: int = 2, dynamic: bool = False) -> Any:
    """Two CLIPs, T5 or none, and a transformer over 16 channels.

    The second CLIP is `second` wide, the transformer `layers` deep; `dynamic`: its noise levels shift with the size.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=NATIVE_SIDE // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=_WIDTH + second,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=_WIDTH + second,
        pos_embed_max_size=24,
    )
    _louder(transformer.proj_out, transformer.norm_out.linear)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
        vae=_vae(16),
        text_encoder=_clip(projection=True),
        tokenizer=byte_tokenizer(),
        text_encoder_2=_clip(projection=True, width=second),
        tokenizer_2=byte_tokenizer(),
        text_encoder_3=_t5(_WIDTH + second) if t5 else None,
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


def write_lora(pipeline: Any, file: Path, *, seed: int = 3) -> Path:
    """A LoRA with random weights for the pipeline's network and, of SDXL, for both text encoders."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(seed)
    parts = {"transformer": ["to_q", "to_v"]}
    if not hasattr(pipeline, "transformer"):
        encoders = {name: ["q_proj", "v_proj"] for name in ("text_encoder", "text_encoder_2")}
        parts = {"unet": ["to_q", "to_v"], **encoders}
    layers: dict[str, Any] = {}
    for part, targets in parts.items():
        module = copy.deepcopy(getattr(pipeline, part))
        module.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
        for name, weight in module.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.2)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
        layers[f"{part}_lora_adapter_metadata"] = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    pipeline.save_lora_weights(file.parent, weight_name=file.name, safe_serialization=True, **layers)
    return file


def write_controlnet(pipeline: Any, folder: Path, *, seed: int = 5) -> Path:
    """A ControlNet for a tiny SDXL whose residuals matter, see `tests.models.write_tiny_controlnet`."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    with torch.no_grad():
        for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.1)
        for name, parameter in net.controlnet_cond_embedding.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                torch.nn.init.kaiming_normal_(parameter)
    return write(net, folder)


def write_embedding(file: Path, *, seed: int = 1) -> Path:
    """A textual inversion of two vectors for both of SDXL's encoders."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    save_file({key: torch.randn((2, _WIDTH), generator=generator) for key in ("clip_l", "clip_g")}, file)
    return file


def t5_tokenizer() -> Any:
    """A T5 tokenizer whose tokens are single letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    return T5Tokenizer(vocab=[(piece, 0.0 if index < 3 else -1.0) for index, piece in enumerate(pieces)], extra_ids=0)


def _euler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def _sdxl_unet(*, text: int, added: int, **overrides: Any) -> Any:
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
        **overrides,
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


def _clip(*, projection: bool, width: int = _WIDTH, layers: int = 2) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = byte_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_TOKENS,
        projection_dim=width,
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
