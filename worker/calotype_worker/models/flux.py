"""Flux: CLIP's pooled vector, T5's sequence, and a transformer over 2x2 patches of latents (Black Forest Labs 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from calotype_shared.schema.enums import SamplerType
from calotype_worker.models.base import Conditioning, Text
from calotype_worker.models.flow import FlowModel, PlainText
from calotype_worker.models.latent import Setup
from calotype_worker.request import GenerationRequest
from calotype_worker.sampling.samplers import FLOW_SAMPLERS

T5_TOKENS = 512  # as diffusers' pipeline reads by default


class Flux(FlowModel):
    """A `StepModel` around the parts of a `FluxPipeline`.

    Flux is guidance-distilled: "dev" gets the scale as an input and "schnell" has none, so rows are not doubled
    and negative prompts have no effect.
    """

    flow_samplers = {SamplerType.EULER: FLOW_SAMPLERS[SamplerType.EULER]}  # noqa: RUF012 - others take no noise levels
    embedded_guidance = True

    def __init__(self, pipeline: Any, setup: Setup) -> None:
        super().__init__(
            pipeline,
            setup,
            denoiser=pipeline.transformer,
            text_encoders={"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2},
        )
        length = int(pipeline.tokenizer.model_max_length)
        self._clip = PlainText(pipeline.tokenizer, pipeline.text_encoder, length=length, device=setup.device)
        self._t5 = PlainText(pipeline.tokenizer_2, pipeline.text_encoder_2, length=T5_TOKENS, device=setup.device)
        self._reads_guidance = bool(pipeline.transformer.config.guidance_embeds)

    def _timesteps(self, request: GenerationRequest) -> dict[str, Any]:
        steps = request.num_inference_steps
        mu = self._shift(request.width, request.height, default_max=1.15)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    def text_windows(self, field: str, prompt: str) -> int:
        self._t5.check(field, prompt)
        return 1

    def _encode(self, texts: Sequence[Text]) -> list[Conditioning]:
        """`text`: T5's sequence; `pooled`: CLIP's vector."""
        prompts = [text.prompt for text in texts]
        with self._using("text_encoder"):
            pooled = self._clip.encoder(self._clip.tokens(prompts)).pooler_output.to(self.dtype)
        with self._using("text_encoder_2"):
            text = self._t5.encoder(self._t5.tokens(prompts))[0].to(self.dtype)
        return [{"text": own.clone(), "pooled": p.clone()} for own, p in zip(text, pooled, strict=True)]

    def row_inputs(self, request: GenerationRequest, *, negative: bool) -> Conditioning:
        return {"guidance": torch.tensor(request.guidance_scale)} if self._reads_guidance else {}

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        network: Any = None,
    ) -> torch.Tensor:
        count, channels, height, width = latents.shape
        patches = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(height // 2, width // 2, 3, device=self.device, dtype=self.dtype)
        places[..., 1] += torch.arange(height // 2, device=self.device)[:, None]
        places[..., 2] += torch.arange(width // 2, device=self.device)[None, :]
        text = conditioning["text"]
        output = (network or self._denoiser)(
            hidden_states=patches.reshape(count, (height // 2) * (width // 2), channels * 4).to(self.dtype),
            timestep=timesteps.to(self.dtype) / 1000,
            guidance=conditioning.get("guidance"),
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=places.reshape(-1, 3),
            return_dict=False,
        )[0]
        velocity = output.float().reshape(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return velocity.reshape(count, channels, height, width)
