"""Common code of the families with a U-Net: Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from calotype_worker.models.base import Conditioning, Rows
from calotype_worker.models.controlnet import Residuals, control_residuals
from calotype_worker.models.controlnet_load import load_controlnets
from calotype_worker.models.latent import LatentModel, Setup
from calotype_worker.request import GenerationRequest


class UNetModel(LatentModel):
    """ControlNets, a guidance scale as a network input (LCM), and additional input channels."""

    def __init__(self, pipeline: Any, setup: Setup, *, text_encoders: Mapping[str, torch.nn.Module]) -> None:
        unet = pipeline.unet
        controls = load_controlnets(
            setup.adapters.controls, dtype=setup.dtype, unet=unet, channels=pipeline.vae.config.latent_channels
        )
        super().__init__(
            pipeline,
            setup,
            denoiser=unet.to(memory_format=torch.channels_last),
            text_encoders=text_encoders,
            controls=controls,
        )
        self._guidance_features = int(unet.config.time_cond_proj_dim or 0)
        self.embedded_guidance = self._guidance_features > 0

    def row_inputs(self, request: GenerationRequest, *, negative: bool) -> Conditioning:
        if not self.embedded_guidance:
            return {}
        return {"guidance": guidance_embedding(request.guidance_scale, self._guidance_features)}

    @torch.inference_mode()
    def predict(self, rows: Rows) -> torch.Tensor:
        added = self._added(rows.conditioning)
        residuals = control_residuals(self._controls, rows, dtype=self.dtype, added=added)
        with self._using("denoiser"), self.loras.active(rows.loras):
            return self.forward(rows.latents, rows.timesteps, rows.conditioning, residuals, self._network(rows))

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        residuals: Residuals = (None, None),
        network: Any = None,
    ) -> torch.Tensor:
        if self.mask_channels:
            latents = torch.cat([latents, conditioning["inpainting"].to(latents)], dim=1)
        guidance = conditioning.get("guidance")
        output: torch.Tensor = (network or self._denoiser)(
            latents.to(self.dtype, memory_format=torch.channels_last),
            timesteps,
            encoder_hidden_states=conditioning["text"],
            encoder_attention_mask=conditioning.get("text_mask"),
            added_cond_kwargs=self._added(conditioning),
            timestep_cond=guidance.to(self.dtype) if guidance is not None else None,
            down_block_additional_residuals=residuals[0],
            mid_block_additional_residual=residuals[1],
            return_dict=False,
        )[0]
        return output.float()

    def _added(self, conditioning: Conditioning) -> dict[str, torch.Tensor] | None:
        """The network's inputs besides the prompt and the timestep."""
        return None


def guidance_embedding(guidance_scale: float, features: int) -> torch.Tensor:
    """Sinusoidal embedding of a guidance scale, (features,), as distilled networks read it (Meng et al. 2023).

    The formula of diffusers' `get_guidance_scale_embedding`, of (scale - 1) in thousandths.
    """
    half = features // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (guidance_scale - 1) * 1000.0 * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()])
    return torch.nn.functional.pad(embedding, (0, features - 2 * half))
