"""The demo model's autoencoder: 8x down-sampling, 4 latent channels, half a million parameters."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from calotype_train.demo.averaging import Average
from calotype_train.demo.scenes import draw, random_scene

CROP = 64  # pixels: small crops learn the same edges for a quarter of the cost
BATCH = 8
CROPS_UNTIL = 0.85  # of the run; then whole images


def build_vae() -> Any:
    """An `AutoencoderKL` initialized near the identity, because with the default initialization it hardly learns."""
    from diffusers import AutoencoderKL  # noqa: PLC0415 - seconds to import, and `--help` needs none of it

    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=128,
    )
    _start_near_identity(vae)
    return vae


def train_vae(
    vae: Any,
    *,
    share_done: Callable[[], float],
    device: torch.device,
    seed: int,
    log: Callable[[dict[str, float]], None],
) -> dict[str, float]:
    """Train until `share_done()` reaches 1. Stores the averaged weights in `vae`; returns its PSNR in dB.

    Loss: L1 + L2 + 0.5 * L1 of the image gradients + 2e-4 * KL.
    """
    rng = random.Random(seed)
    vae.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.98))
    average = Average(vae, decay=0.997)
    step = 0
    while (share := share_done()) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * float(np.cos(np.pi * share))) + 1e-6
        images = image_batch(rng, BATCH if share < CROPS_UNTIL else 3, crop=share < CROPS_UNTIL).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(decoded.float(), images) + 2e-4 * posterior.kl().mean() / CROP
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae)
        step += 1
        if step % 100 == 0:
            log({"vae_step": step, "vae_loss": loss.item(), "share": share})
    average.copy_to(vae)
    return measure(vae, device=device)


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    difference = decoded - images
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + difference.square().mean() + 0.5 * edges


@torch.inference_mode()
def measure(vae: Any, *, device: torch.device, count: int = 64, seed: int = 99) -> dict[str, float]:
    """Reconstruction of whole unseen images: PSNR in dB, mean error of 255, and the latents' deviation."""
    vae.eval()
    images = image_batch(random.Random(seed), count, crop=False).to(device)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(8)])
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(8)]).clamp(-1, 1)
    error = (decoded - images) / 2
    return {
        "psnr_db": float(-10 * error.square().mean().log10()),
        "mean_error_of_255": float(error.abs().mean() * 255),
        "latent_std": float(latents.std()),
    }


def image_batch(rng: random.Random, count: int, *, crop: bool) -> torch.Tensor:
    """New scenes in -1..1, (count, 3, H, W). Crops are chosen for contrast, because flat color teaches little."""
    images = []
    for _ in range(count):
        scene = random_scene(rng, width=128, height=128)
        pixels = np.asarray(draw(scene, width=128, height=128, rng=rng), dtype=np.float32)
        if crop:
            corners = [(8 * rng.randrange(9), 8 * rng.randrange(9)) for _ in range(4)]
            crops = [pixels[y : y + CROP, x : x + CROP] for x, y in corners]
            pixels = max(crops, key=lambda c: float(c.std())) if rng.random() < 0.9 else crops[0]
        images.append(pixels)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


@torch.no_grad()
def _start_near_identity(vae: Any) -> None:
    """Residual branches start at a tenth, and every other trunk convolution passes its channels straight through."""
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.conv2.weight.mul_(0.1)
            if module.conv_shortcut is not None:
                _pass_through(module.conv_shortcut)
        elif type(module).__name__ in ("Downsample2D", "Upsample2D"):
            _pass_through(module.conv)


def _pass_through(conv: nn.Conv2d) -> None:
    """Channel i in to channel i out (modulo the smaller count), at the kernel's centre; small noise elsewhere."""
    nn.init.normal_(conv.weight, std=0.02)
    outputs, inputs, height, width = conv.weight.shape
    for channel in range(outputs):
        conv.weight[channel, channel % inputs, height // 2, width // 2] += 1.0
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def to_latents(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Unscaled latents of images in -1..1: (B, 4, H/8, W/8)."""
    with torch.inference_mode(), torch.autocast(images.device.type, dtype=torch.bfloat16):
        return vae.encode(images).latent_dist.mode().float()
