"""Stable Diffusion 3 and 3.5: three text encoders and a multimodal transformer (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from calotype_shared.schema.enums import SamplerType
from calotype_worker.models.base import Conditioning, Text
from calotype_worker.models.flow import FlowModel, PlainText
from calotype_worker.models.latent import Setup
from calotype_worker.request import GenerationRequest
from calotype_worker.sampling.samplers import Sampler

T5_TOKENS = 256  # as diffusers' pipeline reads by default


class StableDiffusion3(FlowModel):
    """A `StepModel` around the parts of a `StableDiffusion3Pipeline`; T5, the third encoder, may be absent."""

    @classmethod
    def samplers_for(cls, pipeline: Any) -> Mapping[Any, Sampler]:
        found = super().samplers_for(pipeline)
        if pipeline.scheduler.config.get("use_dynamic_shifting"):  # which diffusers' Heun cannot
            return {kind: spec for kind, spec in found.items() if kind is SamplerType.EULER}
        return found

    def __init__(self, pipeline: Any, setup: Setup) -> None:
        names = [n for n in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipeline, n) is not None]
        super().__init__(
            pipeline,
            setup,
            denoiser=pipeline.transformer,
            text_encoders={name: getattr(pipeline, name) for name in names},
        )
        length = int(pipeline.tokenizer.model_max_length)
        device = setup.device
        self._clips = {
            "text_encoder": PlainText(pipeline.tokenizer, pipeline.text_encoder, length=length, device=device),
            "text_encoder_2": PlainText(
                pipeline.tokenizer_2, pipeline.text_encoder_2, length=length, device=setup.device
            ),
        }
        self._t5 = None
        if pipeline.text_encoder_3 is not None:
            self._t5 = PlainText(pipeline.tokenizer_3, pipeline.text_encoder_3, length=T5_TOKENS, device=device)
        self._features = int(pipeline.transformer.config.joint_attention_dim)

    def _timesteps(self, request: GenerationRequest) -> dict[str, Any]:
        if not self.scheduler_config.get("use_dynamic_shifting"):
            return {}
        return {"mu": self._shift(request.width, request.height, default_max=1.16)}

    def text_windows(self, field: str, prompt: str) -> int:
        # CLIP reads only the beginning, T5 all of it. Without T5, text beyond the beginning would be lost.
        (self._t5 or self._clips["text_encoder"]).check(field, prompt)
        return 1

    def _encode(self, texts: Sequence[Text]) -> list[Conditioning]:
        """`text`: both CLIPs side by side, padded to T5's features, then T5's; `pooled`: both CLIPs' projections."""
        prompts = [text.prompt for text in texts]
        sides, pooled = [], []
        for name, clip in self._clips.items():
            with self._using(name):
                output = clip.encoder(clip.tokens(prompts), output_hidden_states=True)
            sides.append(output.hidden_states[-2])
            pooled.append(output[0])
        clips = torch.cat(sides, dim=-1)
        clips = torch.nn.functional.pad(clips, (0, self._features - clips.shape[-1]))
        if self._t5 is None:
            sequence = clips.new_zeros((len(prompts), T5_TOKENS, self._features))
        else:
            with self._using("text_encoder_3"):
                sequence = self._t5.encoder(self._t5.tokens(prompts))[0]
        text = torch.cat([clips, sequence.to(clips)], dim=1).to(self.dtype)
        projections = torch.cat(pooled, dim=-1).to(self.dtype)
        return [{"text": own.clone(), "pooled": p.clone()} for own, p in zip(text, projections, strict=True)]

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        network: Any = None,
    ) -> torch.Tensor:
        output: torch.Tensor = (network or self._denoiser)(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]
        return output.float()
