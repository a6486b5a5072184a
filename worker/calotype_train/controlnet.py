"""ControlNet (Zhang et al. 2023): a copy of the U-Net's encoder that reads a control image.

It steers the frozen U-Net through convolutions that start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from calotype_shared.errors import InvalidRequest
from calotype_train.data import Batch
from calotype_train.pipeline import BaseModel, Shot


class ControlNetRecipe:
    """`light` leaves out the copy's attention. It is far smaller, and only the U-Net sees the prompt."""

    name = "controlnet"

    def __init__(
        self,
        model: BaseModel,
        *,
        embedding_channels: Sequence[int] = (16, 32, 96, 256),
        light: bool = False,
        seed: int = 0,
    ) -> None:
        """`embedding_channels`: widths of the small network that brings the control image to the latents' size.

        Raises:
            InvalidRequest: they do not halve the image as often as the VAE does.
        """
        from diffusers import ControlNetModel  # noqa: PLC0415 - takes seconds, and `--help` needs none of it

        halvings = len(model.vae.config.block_out_channels) - 1
        if len(embedding_channels) != halvings + 1:
            raise InvalidRequest(
                f"has {len(embedding_channels)} widths, and the VAE of this model halves an image {halvings} times",
                field="--embedding-channels",
                value=",".join(map(str, embedding_channels)),
                remedy=f"give {halvings + 1} widths, such as {','.join(str(8 * i) for i in range(1, halvings + 2))}",
            )
        self.model = model
        self._channels, self._light = tuple(embedding_channels), light
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the embedding starts random, its last layer at zero: no effect at first
            net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=self._channels)
            self.net = (_without_attention(net) if light else net).to(model.device).requires_grad_(True).eval()
        self.parameters: Mapping[str, torch.nn.Parameter] = dict(self.net.named_parameters())
        self._pipeline: Any = None

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"embedding_channels": list(self._channels), "light": self._light}

    def predict(self, batch: Batch, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        assert batch.conditions is not None
        text = self.model.encode_texts(batch.captions)
        down, middle = self.net(
            noised,
            timesteps,
            encoder_hidden_states=text,
            controlnet_cond=batch.conditions.to(noised.device),
            return_dict=False,
        )
        predicted: torch.Tensor = self.model.unet(
            noised,
            timesteps,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return predicted

    def images(self, shots: Sequence[Shot], *, trained: bool) -> list[Image.Image]:
        """Untrained is the model without any ControlNet."""
        from diffusers import StableDiffusionControlNetPipeline  # noqa: PLC0415

        if not trained:
            bare = [Shot(prompt=s.prompt, seed=s.seed, width=s.width, height=s.height) for s in shots]
            return self.model.images(bare)
        if self._pipeline is None:
            self._pipeline = StableDiffusionControlNetPipeline(
                **self.model.pipeline.components, controlnet=self.net, requires_safety_checker=False
            )
            self._pipeline.set_progress_bar_config(disable=True)
        return self.model.images(shots, self._pipeline)

    def save(self, path: Path) -> None:
        """A folder for `ControlNetModel.from_pretrained`, in float16."""
        from diffusers import ControlNetModel  # noqa: PLC0415

        net = ControlNetModel.from_config(self.net.config)
        net.load_state_dict(self.net.state_dict())
        net.half().save_pretrained(path, safe_serialization=True)
        for file in path.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes for the owner alone


def _without_attention(full: Any) -> Any:
    """The same ControlNet without its attention layers; the others keep the U-Net's weights."""
    from diffusers import ControlNetModel  # noqa: PLC0415

    blocks = {
        "down_block_types": ["DownBlock2D"] * len(full.config.down_block_types),
        "mid_block_type": "UNetMidBlock2D",
    }
    light = ControlNetModel.from_config({**full.config, **blocks})
    missing = light.load_state_dict(full.state_dict(), strict=False).missing_keys
    if missing:
        raise RuntimeError(f"layers of the light ControlNet that the U-Net does not have: {missing}")
    return light
