"""Tiny Stable Diffusion folders with random weights, built from config: real parts, no hub, a second to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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


def write_tiny_lora(file: Path, *, seed: int, text: bool = False, rank: int = 4, alpha: float = 8.0) -> Path:
    """A LoRA with random weights for the tiny model, saved as diffusers does.

    Strong enough to change every image, and no stronger: a network beyond reason turns rounding into levels.
    """
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = tiny_pipeline()
    torch.manual_seed(seed)
    layers: dict[str, Any] = {}
    targets = {"unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"]}
    targets |= {"text_encoder": ["q_proj", "v_proj"]} if text else {}
    for part, modules in targets.items():
        module = getattr(pipeline, part)
        module.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, init_lora_weights=False),
            adapter_name="default",
        )
        for name, weight in module.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.2)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
        layers[f"{part}_lora_adapter_metadata"] = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    StableDiffusionPipeline.save_lora_weights(file.parent, weight_name=file.name, safe_serialization=True, **layers)
    return file


def write_kohya_lora(file: Path, source: Path) -> Path:
    """The same LoRA as `source` in the spelling that community tools write: flat names, alpha beside the weights."""
    from safetensors.torch import load_file, save_file

    state = {}
    for key, tensor in load_file(source).items():
        part, _, rest = key.partition(".")
        module, _, kind = rest.rpartition(".lora_")
        flat = f"lora_{'unet' if part == 'unet' else 'te_text_model'}_{module.replace('.', '_')}"
        state[f"{flat}.lora_{'down' if kind.startswith('A') else 'up'}.weight"] = tensor
        state[f"{flat}.alpha"] = torch.tensor(8.0)
    save_file(state, file)
    return file


def write_tiny_controlnet(folder: Path, *, seed: int) -> Path:
    """A ControlNet for the tiny model whose residuals matter: its last layers are zero when fresh."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(tiny_pipeline().unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    with torch.no_grad():
        for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.1)
        # Fresh layers shrink the image until their biases are all that is left of it.
        for name, parameter in net.controlnet_cond_embedding.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                torch.nn.init.kaiming_normal_(parameter)
    net.save_pretrained(folder, safe_serialization=True)
    return folder


def write_tiny_embedding(file: Path, token: str, *, seed: int, vectors: int = 2) -> Path:
    """A textual inversion for the tiny model."""
    from safetensors.torch import save_file

    save_file({token: torch.randn((vectors, 32), generator=torch.Generator().manual_seed(seed))}, file)
    return file


def sample_image(seed: int, width: int = NATIVE_SIDE, height: int = NATIVE_SIDE) -> np.ndarray:
    """Smooth random colors, uint8 (H, W, 3)."""
    coarse = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return (smooth * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
