"""A model family of one's own, through the real engine: images of one plain color, by an exact denoiser.

Needs no worker. Writes out/model_adapter.png. docs/how-to/model-adapter.md explains it part by part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from sheet import save_sheet

from calotype_shared.schema.enums import SamplerType
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.engine import Engine, GenerationRequest
from calotype_worker.models.accelerations import EXACT
from calotype_worker.models.base import Conditioning, Rows, Text
from calotype_worker.sampling.samplers import SAMPLERS, make_scheduler

COLORS: Mapping[str, tuple[float, float, float]] = {  # in -1..1, as latents are
    "red": (0.8, -0.7, -0.7),
    "green": (-0.7, 0.4, -0.5),
    "blue": (-0.6, -0.4, 0.8),
    "yellow": (0.9, 0.7, -0.6),
}
CELL = 8  # pixels a latent cell
SCHEDULE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
CHOSEN = {kind: SAMPLERS[kind] for kind in (SamplerType.DDIM, SamplerType.EULER, SamplerType.DPMPP_2M)}


class PlainColors:
    """A `StepModel` whose world is four images. For these the best denoiser can be written down: no weights."""

    mask_channels = 0
    embedded_guidance = False
    accelerations = EXACT
    weight_bytes = 0

    def __init__(self, name: str = "colors") -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.card = ModelCard(
            name=name,
            family="plain_colors",
            version="1",
            size_multiple=CELL,
            native_sizes=((64, 64),),
            max_pixels=256 * 256,
            max_prompt_tokens=77,
            samplers=tuple(CHOSEN),
            features=frozenset({"text_to_image", "image_to_image", "inpainting", "preview"}),
        )
        self._colors = torch.tensor(list(COLORS.values()))  # (K, 3)
        betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2
        self._alphas = (1 - betas).cumprod(0)  # ᾱ_t

    def to(self, device: torch.device) -> None:
        """There is nothing to move."""

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return 3, height // CELL, width // CELL

    def make_scheduler(self, request: GenerationRequest) -> Any:
        return make_scheduler(request.sampler, SCHEDULE, request.num_inference_steps, samplers=CHOSEN)

    # ---- text

    def text_windows(self, field: str, prompt: str) -> int:
        return 1

    def text_loras(self, names: Sequence[str]) -> frozenset[str]:
        return frozenset()  # none come: the card has no feature `lora`

    def encode(self, texts: Sequence[Text]) -> Sequence[Conditioning]:
        """The colors a prompt names, as logarithms of shares; all of them where it names none."""
        found = []
        for text in texts:
            named = torch.tensor([color in text.prompt.split() for color in COLORS])
            found.append({"colors": torch.where(named | ~named.any(), 0.0, -1e9)})  # (K,)
        return found

    def row_inputs(self, request: GenerationRequest, *, negative: bool) -> Conditioning:
        return {}

    # ---- the network

    def predict(self, rows: Rows) -> torch.Tensor:
        return self.forward(rows.latents, rows.timesteps, rows.conditioning)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The noise in each row. x_t = √ᾱ x_0 + √(1-ᾱ) ε, and x_0 is one of K images: Bayes gives its mean."""
        alpha = self._alpha(timesteps)  # (R, 1, 1, 1)
        images = self._colors.reshape(1, -1, 3, 1, 1)  # (1, K, 3, 1, 1)
        distances = (latents.unsqueeze(1) - alpha.unsqueeze(1).sqrt() * images).square().sum((2, 3, 4))  # (R, K)
        shares = (conditioning["colors"] - distances / (2 * (1 - alpha.flatten(1)))).softmax(1)
        mean = (shares @ self._colors).reshape(-1, 3, 1, 1)
        return (latents - alpha.sqrt() * mean) / (1 - alpha).sqrt()

    def predicted_original(self, latents: torch.Tensor, outputs: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha = self._alpha(timesteps)
        return (latents - (1 - alpha).sqrt() * outputs) / alpha.sqrt()

    def _alpha(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self._alphas[timesteps.round().long()].reshape(-1, 1, 1, 1)

    # ---- pixels

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cells = torch.nn.functional.avg_pool2d(pixels.float(), CELL)
        return cells, torch.zeros_like(cells)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        large = latents.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)
        return ((large.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    def preview(self, latents: torch.Tensor) -> np.ndarray:
        return ((latents.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def main() -> None:
    engine = Engine(PlainColors())
    engine.start()
    try:
        requests = [
            GenerationRequest(
                request_id=color,
                prompt=f"a {color} wall",
                width=64,
                height=64,
                num_inference_steps=steps,
                guidance_scale=guidance,
                seed=7,
                sampler=sampler,
            )
            for color, steps, guidance, sampler in (
                ("red", 20, 1.0, SamplerType.DDIM),
                ("green", 12, 2.0, SamplerType.EULER),
                ("blue", 8, 1.0, SamplerType.DPMPP_2M),
                ("yellow", 30, 1.5, SamplerType.EULER),
            )
        ]
        made = [(future.result(), request) for request, future in [(r, engine.submit(r)) for r in requests]]
        save_sheet("model_adapter", [(Image.fromarray(generated.image), request.prompt) for generated, request in made])
    finally:
        engine.stop()


if __name__ == "__main__":
    main()
