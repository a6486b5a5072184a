"""The model to train on: a frozen Stable Diffusion pipeline in float32, with the functions that recipes need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from calotype_shared.errors import InvalidRequest
from calotype_worker.models.registry import demo_folder


@dataclass(frozen=True, kw_only=True)
class Shot:
    """An image to generate for a sample sheet."""

    prompt: str
    seed: int
    width: int  # pixels
    height: int
    condition: Image.Image | None = None


class BaseModel:
    """A frozen pipeline. The recipe owns it and adds adapters to the U-Net or words to the encoder."""

    def __init__(self, name: str, *, device: str = "cpu") -> None:
        """`name`: demo, or the folder of a whole diffusers pipeline.

        Raises:
            InvalidRequest: the folder or device does not exist, or the folder has no Stable Diffusion pipeline with
                safetensors weights.
        """
        self.name = name
        self.folder = demo_folder() if name == "demo" else Path(name)
        self.device = _device(device)
        self.pipeline = _load(name, self.folder).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (self.unet, self.vae, self.text_encoder):
            part.requires_grad_(False).eval()
        notes = self.folder / "calotype.json"
        own = json.loads(notes.read_text()) if notes.is_file() else {}
        side = int(self.unet.config.sample_size) * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.sizes = [(int(width), int(height)) for width, height in own.get("native_sizes", [(side, side)])]
        recommended = own.get("recommended", {})
        self.inference_steps = int(recommended.get("num_inference_steps", 30))
        self.guidance_scale = float(recommended.get("guidance_scale", 7.5))
        self._texts: dict[str, torch.Tensor] = {}

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def text_encoder(self) -> Any:
        return self.pipeline.text_encoder

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    def encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        """(B, tokens, features), each caption encoded once in a run."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        for begin in range(0, len(new), 64):
            part = new[begin : begin + 64]
            with torch.no_grad():
                self._texts.update(zip(part, self.text_encoder(self.token_ids(part))[0].cpu(), strict=True))
        return torch.stack([self._texts[caption] for caption in captions]).to(self.device)

    def token_ids(self, captions: Sequence[str]) -> torch.Tensor:
        """(B, tokens) int64, padded and cut as the pipeline does it."""
        ids: torch.Tensor = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids.to(self.device)

    def images(self, shots: Sequence[Shot], pipeline: Any = None, **options: Any) -> list[Image.Image]:
        """One image per shot, by the plain diffusers pipeline (or a given one), each from its own seed."""
        made = []
        for shot in shots:
            condition = {} if shot.condition is None else {"image": shot.condition}
            made += (pipeline or self.pipeline)(
                shot.prompt,
                width=shot.width,
                height=shot.height,
                num_inference_steps=self.inference_steps,
                guidance_scale=self.guidance_scale,
                generator=torch.Generator().manual_seed(shot.seed),
                **condition,
                **options,
            ).images
        return made


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequest(
            "is not available to torch",
            field="--device",
            value=name,
            remedy="use cpu, or cuda:0 if there is a GPU",
        ) from error
    return device


def _load(name: str, folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline  # noqa: PLC0415 - takes seconds, and the check needs none of it

    index = folder / "model_index.json"
    if not index.is_file():
        raise InvalidRequest(
            "is not a model",
            field="--model",
            value=name,
            remedy="give demo, or the folder of a complete diffusers pipeline (with model_index.json)",
        )
    try:
        family = json.loads(index.read_text())["_class_name"]
        if family != "StableDiffusionPipeline":
            raise ValueError(f"it is a {family}, and only a StableDiffusionPipeline can be trained on")
        return StableDiffusionPipeline.from_pretrained(
            str(folder),
            torch_dtype=torch.float32,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as error:
        # from_pretrained raises almost anything for a broken folder.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidRequest(
            f"could not be loaded: {reason}",
            field="--model",
            value=name,
            remedy="give demo, or a Stable Diffusion folder with safetensors weights",
        ) from error
