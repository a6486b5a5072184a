"""`GenerationRequest`: one picture for the engine to make, and `Generated`: the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self

from calotype_shared.config import GenerationConfig, SamplerType
from calotype_shared.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np


class GroupKey(NamedTuple):
    """What rows must share to go through one forward pass. Everything else is each row's own."""

    model: str
    latent_shape: tuple[int, int, int]  # (C, h, w)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One picture. All of a `GenerationConfig` that the engine needs, with nothing left open."""

    request_id: str
    prompt: str
    width: int  # pixels
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    sampler: SamplerType
    negative_prompt: str = ""

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def rows(self) -> int:
        """Rows of a step batch this takes: guidance needs an unconditional one beside the conditional one."""
        return 2 if self.guided else 1

    @classmethod
    def from_config(cls, config: GenerationConfig, *, index: int = 0, request_id: str) -> Self:
        """Picture number `index` of a resolved config; its seed is the config's plus `index`.

        Raises:
            InvalidRequest: the config was not resolved, or has no such picture.
        """
        if config.seed is None or config.width is None or config.height is None:
            raise InvalidRequest(
                "seed, width or height is still open", field="config", value=config, remedy="resolve the config first"
            )
        if not 0 <= index < config.num_images:
            raise InvalidRequest(
                f"the config asks for {config.num_images} pictures",
                field="index",
                value=index,
                remedy=f"use 0 to {config.num_images - 1}",
            )
        return cls(
            request_id=request_id,
            prompt=config.prompt,
            negative_prompt=config.negative_prompt,
            width=config.width,
            height=config.height,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            seed=config.seed + index,
            sampler=config.sampler,
        )


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A finished picture. `timings` are seconds spent in wait (for a place), encode, denoise and decode."""

    request_id: str
    image: np.ndarray  # uint8 (H, W, 3)
    seed: int
    steps_taken: int  # network evaluations
    timings: Mapping[str, float] = field(default_factory=dict)
