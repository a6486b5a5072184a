"""`LatentModel`: common code of all latent diffusion families: autoencoder, LoRAs, previews, placement of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from calotype_shared.errors import ModelLoadError
from calotype_shared.schema.enums import Feature
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.accelerations import EXACT, Accelerations
from calotype_worker.models.autoencoder import Autoencoder
from calotype_worker.models.base import Conditioning, Rows, Text
from calotype_worker.models.deep_cache import DeepCache
from calotype_worker.models.first_block_cache import FirstBlockCache
from calotype_worker.models.lora import LoraBank
from calotype_worker.models.quantized import quantize, weight_bytes
from calotype_worker.models.token_merging import merge_tokens
from calotype_worker.request import GenerationRequest
from calotype_worker.sampling.samplers import Sampler, is_edm, make_scheduler, samplers_following

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Options that save memory at the cost of speed. Except VAE tiling, they change images only by rounding.

    `offload`: "model" keeps only the active part on the device (text encoder, network or autoencoder),
    "sequential" only the active layer, which is far slower. With "model", networks of pipeline models that fit into
    `budget` (bytes) stay on the device.
    """

    attention_slicing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    offload: Literal["none", "model", "sequential"] = "none"
    budget: int | None = None


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The files that an operator registered for one model, by name."""

    loras: Mapping[str, Path] = field(default_factory=dict)  # safetensors files
    embeddings: Mapping[str, Path] = field(default_factory=dict)  # textual inversions; the name is the token
    controls: Mapping[str, str] = field(default_factory=dict)  # ControlNet folders or hub ids
    lora_capacity: int = 8  # LoRAs in memory


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The options of a model besides its pipeline, which was loaded in `dtype`."""

    card: ModelCard
    device: torch.device
    dtype: torch.dtype
    adapters: Adapters = field(default_factory=Adapters)
    memory: Memory = field(default_factory=Memory)
    accelerations: Accelerations = EXACT


class LatentModel:
    """The common half of a `StepModel`. A family adds its text encoders and its network call."""

    embedded_guidance = False
    mask_channels = 0  # extra input channels of the network: mask and masked image
    size_factor = 1  # the sides of the latents must be multiples of this

    @classmethod
    def features_of(cls, pipeline: Any, adapters: Adapters) -> frozenset[Feature]:
        """The model's capabilities, for its card."""
        features = {Feature.TEXT_TO_IMAGE, Feature.IMAGE_TO_IMAGE, Feature.INPAINTING, Feature.PREVIEW}
        features |= {Feature.PROMPT_WEIGHTS, Feature.LORA} if adapters.loras else {Feature.PROMPT_WEIGHTS}
        return frozenset(features | ({Feature.CONTROLNET} if adapters.controls else set()))

    @classmethod
    def samplers_for(cls, pipeline: Any) -> Mapping[Any, Sampler]:
        """Those with the noise levels of the pipeline's own scheduler, its own first. Empty: none is known."""
        return samplers_following(pipeline.scheduler)

    def __init__(
        self,
        pipeline: Any,
        setup: Setup,
        *,
        denoiser: torch.nn.Module,
        text_encoders: Mapping[str, torch.nn.Module],
        controls: Mapping[str, torch.nn.Module] | None = None,
    ) -> None:
        """`controls` are ControlNets by name."""
        self.card = setup.card  # less what its autoencoder cannot do
        self.device = setup.device
        self.dtype = setup.dtype
        self.scheduler_config: Mapping[str, Any] = dict(pipeline.scheduler.config)
        self.samplers = self.samplers_for(pipeline)
        self._edm = is_edm(pipeline.scheduler)
        self._vae = pipeline.vae.eval()
        if getattr(self._vae.config, "force_upcast", False) and setup.dtype is torch.float16:
            self._vae.to(torch.float32)  # its activations overflow fp16
        self._autoencoder = Autoencoder(self._vae, name=setup.card.name, using=functools.partial(self._using, "vae"))
        self._denoiser = denoiser.eval()
        self._parts: dict[str, torch.nn.Module] = {
            "denoiser": self._denoiser,
            "vae": self._vae,
            **{name: encoder.eval() for name, encoder in text_encoders.items()},
        }
        self._controls = {name: net.to(setup.device) for name, net in (controls or {}).items()}
        self._memory = setup.memory
        self._place_weights(setup.memory)
        self._autoencoder.place(setup.device)
        self.card = _without(setup.card, self._autoencoder.unable())
        component = "transformer" if hasattr(pipeline, "transformer") else "unet"
        self.loras = LoraBank(
            pipeline,
            {component: denoiser, **text_encoders},
            setup.adapters.loras,
            capacity=setup.adapters.lora_capacity,
        )
        self.loras.check()
        self.accelerations = setup.accelerations
        self._step_cache = self._accelerate(setup.accelerations)

    # ---- accelerations that cost likeness

    def _accelerate(self, accelerations: Accelerations) -> DeepCache | FirstBlockCache | None:
        network, name = self._denoiser, self.card.name
        if accelerations.token_merging:
            merge_tokens(network, ratio=accelerations.token_merging, name=name)
        if accelerations.quantized != "off":
            quantize(network, accelerations.quantized, device=self.device, offload=self._memory.offload, name=name)
        if accelerations.deep_cache > 1:
            return DeepCache(network, every=accelerations.deep_cache, loras=self.loras, name=name)
        if accelerations.first_block_cache:
            return FirstBlockCache(network, threshold=accelerations.first_block_cache, loras=self.loras, name=name)
        return None

    def _network(self, rows: Rows) -> Any:
        """The callable for these rows: the denoiser, or the cache in front of it."""
        return self._denoiser if self._step_cache is None else functools.partial(self._step_cache, rows)

    # ---- placement of the weights

    def _place_weights(self, memory: Memory) -> None:
        denoiser: Any = self._denoiser
        if memory.attention_slicing and hasattr(denoiser, "set_attention_slice"):
            denoiser.set_attention_slice("auto")
        if memory.vae_slicing:
            self._vae.enable_slicing()
        if memory.vae_tiling:
            self._vae.enable_tiling()
        if memory.offload == "sequential":
            from accelerate import cpu_offload  # noqa: PLC0415 - only here

            for part in self._parts.values():
                cpu_offload(part, execution_device=self.device)
        elif memory.offload == "none":
            self.to(self.device)

    @contextmanager
    def _using(self, name: str) -> Iterator[None]:
        """Within the block, the part is on the device; with model offload, the others are not."""
        if self._memory.offload == "model":
            for other, part in self._parts.items():
                part.to(self.device if other == name else torch.device("cpu"))
        yield

    def to(self, device: torch.device) -> None:
        if self._memory.offload == "none":
            for part in self._parts.values():
                part.to(device)

    @property
    def weight_bytes(self) -> int:
        return sum(weight_bytes(part) for part in self._parts.values())

    # ---- samplers

    def make_scheduler(self, request: GenerationRequest) -> Any:
        return make_scheduler(
            request.sampler,
            self.scheduler_config,
            request.num_inference_steps,
            samplers=self.samplers,
            **self._timesteps(request),
        )

    def _timesteps(self, request: GenerationRequest) -> dict[str, Any]:
        """Further arguments of `set_timesteps`."""
        return {}

    @functools.cached_property
    def _alphas_cumprod(self) -> torch.Tensor:
        from diffusers import DDPMScheduler  # noqa: PLC0415

        scheduler = DDPMScheduler.from_config(dict(self.scheduler_config))
        alphas: torch.Tensor = scheduler.alphas_cumprod
        return alphas.to(self.device)

    def predicted_original(self, latents: torch.Tensor, outputs: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """From epsilon, v or sample prediction; scaled latents are variance preserving for every sampler with betas."""
        kind = self.scheduler_config.get("prediction_type", "epsilon")
        if self._edm:
            return self._edm_original(latents, outputs, timesteps, sign=-1.0 if kind == "v_prediction" else 1.0)
        if kind == "flow_prediction":
            return latents - (timesteps / 1000).reshape(-1, 1, 1, 1) * outputs
        last = len(self._alphas_cumprod) - 1
        alpha = self._alphas_cumprod[timesteps.round().long().clamp(0, last)].reshape(-1, 1, 1, 1)
        if kind == "epsilon":
            return (latents - (1 - alpha).sqrt() * outputs) / alpha.sqrt()
        if kind == "v_prediction":
            return alpha.sqrt() * latents - (1 - alpha).sqrt() * outputs
        return outputs

    def _edm_original(
        self, latents: torch.Tensor, outputs: torch.Tensor, timesteps: torch.Tensor, *, sign: float
    ) -> torch.Tensor:
        """c_skip · x + c_out · F (Karras et al. 2022, table 1); a timestep is ln(sigma) / 4."""
        sigma = (4 * timesteps).exp().reshape(-1, 1, 1, 1)
        data = float(self.scheduler_config["sigma_data"])
        total = (sigma**2 + data**2).sqrt()  # 1 / c_in
        return data**2 / total * latents + sign * sigma * data / total * outputs

    # ---- the autoencoder

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self._autoencoder.latent_shape(width, height)

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._autoencoder.encode(pixels)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return self._autoencoder.decode(latents)

    def preview(self, latents: torch.Tensor) -> np.ndarray:
        return self._autoencoder.preview(latents)

    # ---- text

    def _by_loras(self, texts: Sequence[Text], encode: Callable[[Sequence[Text]], Sequence[T]]) -> list[T]:
        """`encode` of the texts, those with equal LoRAs together and under these LoRAs; in the order of `texts`."""
        found: dict[Text, T] = {}
        for loras in dict.fromkeys(text.loras for text in texts):
            own = [text for text in texts if text.loras == loras]
            with self.loras.active([(name, torch.tensor([weight], device=self.device)) for name, weight in loras]):
                found |= dict(zip(own, encode(own), strict=True))
        return [found[text] for text in texts]

    # ---- not supported by most families

    def text_loras(self, names: Sequence[str]) -> frozenset[str]:
        text_parts = [part for part in self._parts if part.startswith("text_encoder")]
        return frozenset(name for name in names if any(self.loras.get(name).touches(part) for part in text_parts))

    def row_inputs(self, request: GenerationRequest, *, negative: bool) -> Conditioning:
        return {}


def _without(card: ModelCard, features: Collection[Feature]) -> ModelCard:
    """Raises ModelLoadError if nothing is left that the model can make."""
    left = card.features - {feature.value for feature in features}
    if not left & {Feature.TEXT_TO_IMAGE, Feature.IMAGE_TO_IMAGE, Feature.INPAINTING}:
        raise ModelLoadError(
            f"model {card.name!r}: it starts from images, and its autoencoder cannot encode them as needed; use an "
            "AutoencoderKL in vae/"
        )
    return card.model_copy(update={"features": frozenset(left)})
