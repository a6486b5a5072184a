"""LoRA (Hu et al. 2021): low-rank additions to some of the U-Net's layers, by peft, saved as diffusers saves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from calotype_shared.errors import InvalidRequest
from calotype_train.data import Batch
from calotype_train.pipeline import BaseModel, Shot

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LoraRecipe:
    """`W x + (alpha / rank) B A x` on every layer whose name ends in one of `targets`; A and B are trained."""

    name = "lora"

    def __init__(
        self,
        model: BaseModel,
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: Sequence[str] = ATTENTION,
        seed: int = 0,
    ) -> None:
        """`alpha` defaults to the rank, a scale of 1.

        Raises:
            InvalidRequest: a target names no layer of the U-Net that can take a LoRA.
        """
        from peft import LoraConfig  # noqa: PLC0415 - takes seconds, and `--help` needs none of it

        self.model = model
        self._rank, self._alpha, self._targets = rank, rank if alpha is None else alpha, tuple(targets)
        _check_targets(model.unet, self._targets)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # A starts random, B at zero, so there is no effect at first
            model.unet.add_adapter(
                LoraConfig(
                    r=rank,
                    lora_alpha=self._alpha,
                    init_lora_weights="gaussian",
                    target_modules=[*self._targets],
                )
            )
        self.parameters: Mapping[str, torch.nn.Parameter] = {
            name: p for name, p in model.unet.named_parameters() if p.requires_grad
        }

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"rank": self._rank, "alpha": self._alpha, "targets": list(self._targets)}

    def predict(self, batch: Batch, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        text = self.model.encode_texts(batch.captions)
        predicted: torch.Tensor = self.model.unet(noised, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        return predicted

    def images(self, shots: Sequence[Shot], *, trained: bool) -> list[Image.Image]:
        if trained:
            return self.model.images(shots)
        self.model.unet.disable_adapters()
        try:
            return self.model.images(shots)
        finally:
            self.model.unet.enable_adapters()

    def save(self, path: Path) -> None:
        """A safetensors file for `pipeline.load_lora_weights`; rank and alpha are in its metadata."""
        from diffusers import StableDiffusionPipeline  # noqa: PLC0415
        from peft.utils import get_peft_model_state_dict  # noqa: PLC0415

        unet = self.model.unet
        # peft's own names throughout: diffusers' older ones exist for attention alone, and a file that mixes the two is
        # read without its attention layers.
        layers = get_peft_model_state_dict(unet)
        StableDiffusionPipeline.save_lora_weights(
            str(path.parent),
            unet_lora_layers={name: layer.detach().half().cpu() for name, layer in layers.items()},
            weight_name=path.name,
            safe_serialization=True,
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
        path.chmod(0o644)  # safetensors writes for the owner alone


def _check_targets(unet: Any, targets: Sequence[str]) -> None:
    names = [name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            endings = sorted({name.rpartition(".")[2] for name in names} - {"0", "2"})
            raise InvalidRequest(
                "matches no layer of this U-Net",
                field="--targets",
                value=target,
                remedy=f"use suffixes of layer names, such as {', '.join([*ATTENTION, *endings][:12])}",
            )
