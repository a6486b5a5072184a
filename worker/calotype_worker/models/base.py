"""`StepModel`: the engine's interface to a model family. All family-specific code is behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.accelerations import Accelerations

if TYPE_CHECKING:
    from calotype_worker.request import GenerationRequest

# Per-row inputs of a network by name: text embeddings, added conditioning, extra channels. A family chooses the names;
# the engine stacks what has the same name, and where first dimensions differ pads with zeros and adds `{name}_mask`.
Conditioning = Mapping[str, torch.Tensor]


class Text(NamedTuple):
    """A prompt as its encoding depends on it. Hashable: the engine caches encodings under it."""

    prompt: str
    negative: bool = False
    loras: tuple[tuple[str, float], ...] = ()  # those that change the text encoder
    windows: int = 1  # of the text encoder, at least: a request's two prompts are encoded to the same length


@dataclass(frozen=True, kw_only=True)
class ControlRows:
    """One ControlNet's input to a forward pass. It has no effect on rows with scale 0."""

    name: str
    images: torch.Tensor  # (R, 3, H, W) in 0..1, pixels
    scales: torch.Tensor  # (R,)


@dataclass(kw_only=True, eq=False)
class RowMemory:
    """State that a caching model keeps for one row between steps. Used only by the engine's thread.

    It belongs to the row, so that other rows cannot change it and it is freed when the row leaves.
    """

    step: int = 0  # the row's present step
    kept: dict[str, torch.Tensor] = field(default_factory=dict)  # without a batch dimension


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The input of one forward pass. The R rows must share only the latent shape."""

    latents: torch.Tensor  # (R, C, h, w) float32, scaled for the sampler
    timesteps: torch.Tensor  # (R,) float32, each row its own
    conditioning: Conditioning  # each (R, …)
    lengths: Mapping[str, Sequence[int]] = field(default_factory=dict)  # each row's own length in padded tensors
    loras: Sequence[tuple[str, torch.Tensor]] = ()  # name, and each row's weight (R,); 0: not this row
    controls: Sequence[ControlRows] = ()
    exact: bool = False  # the same bits whatever rows run beside: never process only a part of the rows
    memories: Sequence[RowMemory | None] = ()  # each row's own; None: this row is computed exactly. Empty: all rows are

    def part(self, chosen: slice | Sequence[int]) -> Rows:
        """Some of them."""
        return replace(
            self,
            latents=self.latents[chosen],
            timesteps=self.timesteps[chosen],
            conditioning={name: tensor[chosen] for name, tensor in self.conditioning.items()},
            lengths={name: _chosen(lengths, chosen) for name, lengths in self.lengths.items()},
            loras=[(name, weights[chosen]) for name, weights in self.loras],
            controls=[
                ControlRows(name=control.name, images=control.images[chosen], scales=control.scales[chosen])
                for control in self.controls
            ],
            memories=_chosen(self.memories, chosen) if self.memories else (),
        )


def _chosen(items: Sequence[Any], chosen: slice | Sequence[int]) -> Sequence[Any]:
    return items[chosen] if isinstance(chosen, slice) else [items[index] for index in chosen]


@runtime_checkable
class StepModel(Protocol):
    """A latent diffusion model that can be called one denoising step at a time.

    Called by the engine's thread only, except where stated.
    """

    card: ModelCard
    device: torch.device
    dtype: torch.dtype
    mask_channels: int  # extra input channels, for mask and masked image; 0: inpainting by blending
    embedded_guidance: bool  # the network reads the guidance scale itself, so no row is doubled for it
    accelerations: Accelerations  # those that trade exactness for speed

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) for an image of that size in pixels. Any thread."""
        ...

    def make_scheduler(self, request: GenerationRequest) -> Any:
        """A new diffusers scheduler with the timesteps of the request's full trajectory. Thread-safe.

        Raises:
            InvalidRequest: this model's samplers do not support it.
        """
        ...

    def text_windows(self, field: str, prompt: str) -> int:
        """The number of text encoder windows of a prompt. Thread-safe.

        Raises:
            InvalidRequest: for `field`: the prompt's weights are malformed, or it is longer than the model supports.
        """
        ...

    def text_loras(self, names: Sequence[str]) -> frozenset[str]:
        """Load the LoRAs and return those that change the text encoder. Thread-safe.

        Raises:
            InvalidRequest: no LoRA has this name, or it does not fit this model.
        """
        ...

    def encode(self, texts: Sequence[Text]) -> Sequence[Conditioning]:
        """Conditioning of each text, on the device, in the network's dtype, without a batch dimension."""
        ...

    def row_inputs(self, request: GenerationRequest, *, negative: bool) -> Conditioning:
        """A row's network inputs besides text: sizes, an embedded guidance scale. Without batch dimension."""
        ...

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """`predict` for rows without LoRAs, ControlNets and masks: only tensors, so that it can be compiled."""
        ...

    def predict(self, rows: Rows) -> torch.Tensor:
        """One forward pass. Returns the raw model output, (R, C, h, w) float32."""
        ...

    def predicted_original(self, latents: torch.Tensor, outputs: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Each row's estimated clean latents, from its (scaled) latents and model output; same shapes."""
        ...

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents of images (B, 3, H, W) in -1..1.

        Each (B, C, h, w) float32, scaled like the latents that the sampler works on.
        """
        ...

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images of finished latents (B, C, h, w) float32: uint8 (B, H, W, 3)."""
        ...

    def preview(self, latents: torch.Tensor) -> np.ndarray:
        """A rough image of latents (C, h, w) at almost no cost: uint8 (h, w, 3), one pixel per latent cell."""
        ...

    def to(self, device: torch.device) -> None:
        """Move all weights, for `ModelPool`."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights."""
        ...
