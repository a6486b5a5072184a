"""The demo model's U-Net and text encoder, trained together on latents of drawn scenes."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from calotype_train.demo.averaging import Average
from calotype_train.demo.scenes import draw, random_scene
from calotype_train.demo.tokenizer import POSITIONS
from calotype_train.demo.vae import to_latents

# (width, height) in pixels and how many scenes of each are drawn for training.
SIZES: dict[tuple[int, int], int] = {(128, 128): 14_000, (160, 96): 3_000, (96, 160): 3_000}
FEATURES = 128
_ENCODED_TOGETHER = 16  # images a VAE call
EMPTY_CAPTIONS = 0.12  # share trained without its caption, for classifier-free guidance
LEARNING_RATE = 1e-3
DECAY_FROM = 0.5  # share of the run with a constant rate, before it decays linearly to zero


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Encoded scenes by latent shape, scaled to unit deviation, with their captions' token ids."""

    parts: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (N, 4, h, w) float16, (N, tokens) int64

    def batch(self, rng: random.Random, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of one shape, the shapes in proportion to their number."""
        part = rng.choices(self.parts, weights=[len(latents) for latents, _ in self.parts])[0]
        chosen = torch.tensor(rng.sample(range(len(part[0])), rows))
        return part[0][chosen].float(), part[1][chosen]


def scheduler() -> Any:
    """The noise schedule of Stable Diffusion, spaced so that the first step starts from pure noise."""
    from diffusers import DDIMScheduler  # noqa: PLC0415

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )


def build_text_encoder(vocabulary: int, *, start: int, end: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel  # noqa: PLC0415

    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=FEATURES,
            intermediate_size=3 * FEATURES,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    # CLIP's default deviations are for 512 features; at 128 the words would hardly differ.
    for name, weight in encoder.named_parameters():
        if name.endswith("token_embedding.weight"):
            nn.init.normal_(weight, std=0.3)
        elif name.endswith("position_embedding.weight"):
            nn.init.normal_(weight, std=0.1)
    return encoder


def build_unet(channels: tuple[int, int, int] = (48, 96, 128)) -> Any:
    from diffusers import UNet2DConditionModel  # noqa: PLC0415

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=FEATURES,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def encode_scenes(
    vae: Any, tokenizer: Any, *, scale: float, share: float, device: torch.device, seed: int, cache: Path
) -> Latents:
    """Draw and encode `share` of the scenes in `SIZES`; kept in `cache`, so that a resumed run starts at once."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    parts = []
    for (width, height), count in SIZES.items():
        path = cache / f"latents-{width}x{height}.safetensors"
        if path.exists():
            stored = load_file(path)
        else:
            rng = random.Random(seed * 1_000_003 + width)
            latents, captions = [], []
            for _ in range(0, round(count * share), _ENCODED_TOGETHER):
                scenes = [random_scene(rng, width=width, height=height) for _ in range(_ENCODED_TOGETHER)]
                pixels = np.stack([np.asarray(draw(s, width=width, height=height, rng=rng)) for s in scenes])
                images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
                latents.append((to_latents(vae, images) * scale).half().cpu())
                captions += [scene.caption for scene in scenes]
            stored = {"latents": torch.cat(latents).contiguous(), "tokens": token_ids(tokenizer, captions)}
            save_file(stored, path)
        parts.append((stored["latents"], stored["tokens"]))
    return Latents(parts=tuple(parts))


def token_ids(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """(N, POSITIONS) int64, padded as the pipeline pads."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


class DenoiserTraining:
    """Weights, optimizer and averages of one run; saved and resumed as a whole."""

    def __init__(self, unet: Any, text_encoder: Any, tokenizer: Any, *, device: torch.device, seed: int) -> None:
        self.unet = unet.to(device, memory_format=torch.channels_last)
        self.text_encoder = text_encoder.to(device)
        self.modules = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
        self.average = Average(self.modules, decay=0.999)
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3
        )
        self.step = 0
        self.seconds = 0.0  # training time so far, over all resumed parts
        self._device = device
        self._rng = random.Random(seed)
        self._empty = token_ids(tokenizer, [""])
        self._alphas = scheduler().alphas_cumprod.to(device)
        # Plain noise prediction gives little weight to the noisiest steps, which decide background and shape: after
        # 1,200 training steps, images had their caption's color but not its background. So those steps get more weight.
        signal_to_noise = self._alphas / (1 - self._alphas)
        weights = 1 / (signal_to_noise.sqrt() + 0.15)
        self._weights = weights / weights.mean()

    def train_step(self, data: Latents, *, rows: int, share: float) -> float:
        """One optimizer step at `share` of the run; returns the loss: mean squared error of the noise."""
        rate = LEARNING_RATE * min(1.0, (self.step + 1) / 200)
        rate *= min(1.0, max(0.0, (1 - share) / (1 - DECAY_FROM))) + 1e-3
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        latents, tokens = data.batch(self._rng, rows)
        dropped = torch.rand(rows) < EMPTY_CAPTIONS
        tokens = torch.where(dropped[:, None], self._empty, tokens).to(self._device)
        latents = latents.to(self._device)
        noise = torch.randn_like(latents)
        # One timestep from each of `rows` equal parts of the schedule: less variance than independent draws.
        timesteps = ((torch.randperm(rows) + torch.rand(rows)) / rows * 1000).long().clamp(max=999).to(self._device)
        alphas = self._alphas[timesteps].reshape(-1, 1, 1, 1)
        noised = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        self.modules.train()
        # Measured on two CPU cores, float32 is a quarter faster here than bfloat16; GPUs use bfloat16.
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda"):
            conditioning = self.text_encoder(tokens)[0]
            predicted = self.unet(noised, timesteps, encoder_hidden_states=conditioning, return_dict=False)[0]
        errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        loss = errors.mean()  # the reported value
        (errors * self._weights[timesteps]).mean().backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.modules)
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Write a checkpoint. An interrupted write keeps the previous one."""
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average.weights,
            "updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        scratch = path.with_suffix(".new")
        torch.save(state, scratch)
        scratch.replace(path)

    def resume(self, path: Path) -> None:
        # weights_only: only tensors and numbers are loaded; no code in the file is executed.
        state = torch.load(path, map_location=self._device, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self.average.weights, self.average.updates = state["average"], state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def averaged(self) -> tuple[Any, Any]:
        """Copies of U-Net and text encoder with the averaged weights, in float32 on the CPU."""
        modules = copy.deepcopy(self.modules).cpu()
        self.average.copy_to(modules)
        return modules["unet"].eval(), modules["text_encoder"].eval()
