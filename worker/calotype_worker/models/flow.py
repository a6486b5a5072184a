"""Common code of the flow-matching families: Stable Diffusion 3 and Flux (Lipman et al. 2023, Esser et al. 2024)."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_shared.schema.enums import Feature, SamplerType
from calotype_worker.models.base import Conditioning, Rows, Text
from calotype_worker.models.latent import Adapters, LatentModel, Setup
from calotype_worker.sampling.samplers import FLOW_SAMPLERS, Sampler, sampler_of


class FlowModel(LatentModel):
    """Networks that predict the velocity from image to noise, with prompts read as they are written."""

    flow_samplers: Mapping[SamplerType, Sampler] = FLOW_SAMPLERS
    size_factor = 2  # the network reads patches of 2x2 latent cells

    @classmethod
    def features_of(cls, pipeline: Any, adapters: Adapters) -> frozenset[Feature]:
        features = super().features_of(pipeline, adapters)
        return features - {Feature.PROMPT_WEIGHTS, Feature.CONTROLNET}

    @classmethod
    def samplers_for(cls, pipeline: Any) -> Mapping[Any, Sampler]:
        own = sampler_of(pipeline.scheduler, cls.flow_samplers)
        if own is None:
            return {}
        return {own: cls.flow_samplers[own], **cls.flow_samplers}

    def __init__(
        self,
        pipeline: Any,
        setup: Setup,
        *,
        denoiser: torch.nn.Module,
        text_encoders: Mapping[str, torch.nn.Module],
    ) -> None:
        """Raises ModelLoadError if a textual inversion or ControlNet was registered: these families support neither."""
        unread = [*setup.adapters.embeddings, *setup.adapters.controls]
        if unread:
            raise ModelLoadError(
                f"model {setup.card.name!r}: {', '.join(unread)}: {setup.card.family} supports LoRAs, but no textual "
                "inversions or ControlNets; leave them out, or register them for another model with MODEL/NAME=FILE"
            )
        super().__init__(pipeline, setup, denoiser=denoiser, text_encoders=text_encoders)

    @torch.inference_mode()
    def encode(self, texts: Sequence[Text]) -> Sequence[Conditioning]:
        return self._by_loras(texts, self._encode)

    @abstractmethod
    def _encode(self, texts: Sequence[Text]) -> list[Conditioning]:
        """Of prompts that share their LoRAs."""

    @torch.inference_mode()
    def predict(self, rows: Rows) -> torch.Tensor:
        with self._using("denoiser"), self.loras.active(rows.loras):
            return self.forward(rows.latents, rows.timesteps, rows.conditioning, self._network(rows))

    @abstractmethod
    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        network: Any = None,
    ) -> torch.Tensor: ...

    def predicted_original(self, latents: torch.Tensor, outputs: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x - σ·v; a timestep is a thousandth of σ whatever the schedule's shift."""
        return latents - (timesteps / 1000).reshape(-1, 1, 1, 1) * outputs

    def _shift(self, width: int, height: int, *, default_max: float) -> float:
        """mu, by which larger images keep more noise for longer; linear in the number of patches."""
        _, h, w = self.latent_shape(width, height)
        config = self.scheduler_config
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", default_max)
        slope = (high - low) / (most - least)
        return float((h // 2) * (w // 2) * slope + low - slope * least)


class PlainText:
    """A tokenizer and encoder without weights or windows: CLIP for its pooled vector, or T5 for its sequence."""

    def __init__(self, tokenizer: Any, encoder: Any, *, length: int, device: torch.device) -> None:
        self.encoder = encoder
        self._tokenizer = tokenizer
        self._length = length
        self._device = device
        self._lock = threading.Lock()  # a fast tokenizer refuses two threads at once

    def check(self, field: str, prompt: str) -> None:
        """Any thread. Raises InvalidRequest if the prompt is longer than the encoder reads."""
        with self._lock:
            tokens = len(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if tokens > self._length:
            raise InvalidRequest(
                f"is {tokens} tokens long, and this model reads at most {self._length}",
                field=field,
                value=prompt,
                remedy=f"shorten it by {tokens - self._length} tokens",
            )

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids (len(prompts), length)."""
        with self._lock:
            found = self._tokenizer(
                list(prompts), padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
            )
        ids: torch.Tensor = found.input_ids
        return ids.to(self._device)
