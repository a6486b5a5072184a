"""A model's parts as separate objects, named as in the founding document: schedule, network, text encoder, decoder.

They are the parts that the engine uses, called directly. Do not use them while the same `DiffusionModel` generates
images in another thread.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import SamplerType
from calotype_worker.inprocess.diffusion import DiffusionModel
from calotype_worker.models.base import Rows, Text
from calotype_worker.sampling import Trajectory, build_table, make_scheduler

Array = TypeVar("Array", np.ndarray, torch.Tensor)


class NoiseScheduler:
    """A noise schedule: forward diffusion, and the reverse steps of a sampler, from the engine's own tables.

    Its methods accept arrays and tensors of any shape, and return the type that was given.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        *,
        sampler: SamplerType = SamplerType.DDPM,
        num_inference_steps: int | None = None,
        prediction_type: str = "epsilon",
    ) -> None:
        """`beta_schedule` is one of diffusers', such as linear, scaled_linear or squaredcos_cap_v2.

        By default the sampler takes one step per training timestep.

        Raises:
            InvalidRequest: the sampler does not support that many steps.
        """
        config = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "prediction_type": prediction_type,
        }
        scheduler = make_scheduler(sampler, config, num_inference_steps or num_train_timesteps)
        self._table = build_table(Trajectory.whole(scheduler))
        self._alphas_cumprod: torch.Tensor = scheduler.alphas_cumprod
        self._state: torch.Tensor | None = None
        self._next = 0

    @property
    def timesteps(self) -> torch.Tensor:
        """The timesteps that `step` may be called with, in order: (N,) float32."""
        return self._table.timesteps

    def add_noise(self, original: Array, noise: Array, timestep: float) -> Array:
        """Forward diffusion (Ho et al. 2020): sqrt(ᾱ_t) · original + sqrt(1 - ᾱ_t) · noise."""
        alpha = float(self._alphas_cumprod[int(timestep)])
        return alpha**0.5 * original + (1 - alpha) ** 0.5 * noise

    def step(
        self, model_output: Array, timestep: float, sample: Array, *, generator: torch.Generator | None = None
    ) -> Array:
        """Reverse diffusion: the sample at the next timestep.

        Samplers with state from earlier steps keep it while timesteps follow each other; the first timestep resets it.

        Raises:
            InvalidRequest: not one of `timesteps`, or not the next one, for a sampler with state.
        """
        index = self._index(timestep)
        state: torch.Tensor = torch.zeros(self._table.remembered + 1, *np.shape(sample))
        if index == self._next and self._state is not None and index:
            state = self._state
        state[0] = torch.as_tensor(sample)
        output = torch.as_tensor(model_output, dtype=torch.float32)
        draws = self._table.draws_noise[index]
        noise = torch.randn(state.shape[1:], generator=generator) if draws else torch.zeros(state.shape[1:])
        self._state = torch.einsum("ij,j...->i...", self._table.matrices[index], torch.stack([*state, output, noise]))
        self._next = index + 1
        result = self._state[0]
        return result.numpy() if isinstance(sample, np.ndarray) else result.to(sample)

    def _index(self, timestep: float) -> int:
        """The timestep's index. If a timestep occurs twice in a row: the index of the next one."""
        places = (self._table.timesteps == float(timestep)).nonzero().flatten().tolist()
        if not places:
            raise InvalidRequest(
                "is not one of this scheduler's timesteps",
                field="timestep",
                value=timestep,
                remedy="use those of `timesteps`, in order",
            )
        return self._next if self._next in places else int(places[0])


class UNetModel:
    """The network of a model: predicts the noise in an image's latents."""

    def __init__(self, model: DiffusionModel | None = None) -> None:
        self._model = model or DiffusionModel()

    def __call__(
        self, noisy_image: torch.Tensor, timestep: torch.Tensor | float, text_embedding: torch.Tensor
    ) -> torch.Tensor:
        """`noisy_image` (B, C, h, w), `timestep` one or (B,), `text_embedding` (B, tokens, features).

        The batch dimension is optional for all; the result is shaped like `noisy_image`, float32.
        """
        latents = noisy_image if noisy_image.dim() == 4 else noisy_image.unsqueeze(0)
        text = text_embedding if text_embedding.dim() == 3 else text_embedding.unsqueeze(0)
        model = self._model.step_model
        rows = Rows(
            latents=latents.float().to(model.device),
            timesteps=torch.as_tensor(timestep, dtype=torch.float32, device=model.device).expand(len(latents)),
            conditioning={"text": text.to(model.device, model.dtype).expand(len(latents), -1, -1)},
        )
        return model.predict(rows).reshape(noisy_image.shape)


class TextEncoder:
    """The text encoder of a model, with prompt weights and prompts of any length."""

    def __init__(self, model: DiffusionModel | None = None) -> None:
        self._model = model or DiffusionModel()

    def encode(self, prompt: str) -> torch.Tensor:
        """Embeddings (tokens, features). Raises InvalidRequest for a prompt that is too long."""
        model = self._model.step_model
        windows = model.text_windows("prompt", prompt)
        return model.encode([Text(prompt, windows=windows)])[0]["text"]

    __call__ = encode


class VAEDecoder:
    """The autoencoder of a model, from latents to pixels."""

    def __init__(self, model: DiffusionModel | None = None) -> None:
        self._model = model or DiffusionModel()

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents (B, C, h, w) or (C, h, w) to images, uint8 (B, H, W, 3) or (H, W, 3)."""
        model = self._model.step_model
        batch = latents if latents.dim() == 4 else latents.unsqueeze(0)
        images = model.decode(batch.float().to(model.device))
        return images if latents.dim() == 4 else images[0]

    __call__ = decode
