"""`GenerationRequest`: a request to the engine for one image; `Generated`: the finished image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.config import features_asked
from calotype_shared.schema.enums import Feature, OutputFormat, SamplerType
from calotype_shared.schema.resolve import ResolvedConfig

if TYPE_CHECKING:
    import numpy as np


class GroupKey(NamedTuple):
    """The properties that rows must share to run in one forward pass. All others may differ."""

    model: str
    latent_shape: tuple[Hashable, ...]  # (C, h, w); for an opaque model, all that a run's requests must share

    windows: int = 0  # of the text encoder; set only if bits must not depend on another row's longer prompt

    @property
    def step_shape(self) -> tuple[int, int, int]:
        """The latent shape (C, h, w) of a group that is stepped."""
        return cast("tuple[int, int, int]", self.latent_shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlInput:
    """A ControlNet by its registered name, and the image that it follows."""

    name: str
    image: np.ndarray  # uint8 (H, W, 3), of the request's size
    scale: float = 1.0
    start: float = 0.0  # share of the steps
    end: float = 1.0

    def scale_at(self, step: int, total_steps: int) -> float:
        """Its scale at a step; the same rule as diffusers' `controlnet_keep`."""
        acts = step / total_steps >= self.start and (step + 1) / total_steps <= self.end
        return self.scale if acts else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """One image. All of a `ResolvedConfig` that the engine needs."""

    request_id: str
    prompt: str
    width: int  # pixels
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    sampler: SamplerType
    negative_prompt: str = ""
    model: str = ""  # empty: the engine's first
    interactive: bool = False  # joins its group's step batch before requests that are not
    init_image: np.ndarray | None = None  # uint8 (H, W, 3), of the size above
    mask: np.ndarray | None = None  # bool (H, W), true where to paint; requires init_image
    strength: float = 1.0  # share of the steps that init_image goes through
    loras: tuple[tuple[str, float], ...] = ()  # name, weight
    controls: tuple[ControlInput, ...] = ()
    refiner: str | None = None  # the model that continues with the unfinished latents
    refiner_start: float = 0.8  # share of the steps
    preview_every: int = 0  # steps; 0: no previews
    num_frames: int | None = None  # of a video; None: the model's own
    fps: float | None = None  # frames per second of a video; None: the model's own
    audio_seconds: float | None = None  # None: the model's own
    images: tuple[np.ndarray, ...] = ()  # references to edit or follow, each uint8 (H, W, 3) of any size
    control_image: np.ndarray | None = None  # uint8 (H, W, 3), of the size above
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline's own, by its names
    output_format: OutputFormat | None = None  # the format to be written; None: any

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    # Used to check a request against a model's card (`calotype_shared.schema.resolve.Asked`).

    @property
    def features(self) -> frozenset[Feature]:
        return features_asked(
            source=self.init_image is not None,
            mask=self.mask is not None,
            references=bool(self.images),
            control_image=self.control_image is not None,
            loras=bool(self.loras),
            controls=bool(self.controls),
            refiner=self.refiner is not None,
            previews=self.preview_every > 0,
        )

    @property
    def lora_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.loras)

    @property
    def given(self) -> frozenset[str]:
        held = {
            "init_image": self.init_image is not None,
            "mask_image": self.mask is not None,
            "images": bool(self.images),
            "control_image": self.control_image is not None or bool(self.controls),
        }
        return frozenset(name for name, given in held.items() if given)

    @property
    def control_names(self) -> tuple[str, ...]:
        return tuple(control.name for control in self.controls)

    @classmethod
    def from_config(
        cls,
        config: ResolvedConfig,
        *,
        index: int = 0,
        request_id: str,
        images: Mapping[str, np.ndarray] | None = None,
        interactive: bool = False,
    ) -> Self:
        """The request for image `index` of a config. Its seed is the config's seed plus `index`.

        With an ensemble, all images of the first model come first. `images` holds the config's uploads, uint8
        (H, W, 3): references in their own sizes, the others resized to the config's.

        Raises:
            InvalidRequest: the config has no such image.
        """
        if not 0 <= index < config.image_count:
            raise InvalidRequest(
                f"the config asks for {config.image_count} images",
                field="index",
                value=index,
                remedy=f"use 0 to {config.image_count - 1}",
            )
        images = images or {}
        mask = images[config.mask_image] if config.mask_image else None
        return cls(
            request_id=request_id,
            interactive=interactive,
            prompt=config.prompt,
            negative_prompt=config.negative_prompt,
            width=config.width,
            height=config.height,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            seed=config.seed + index % config.num_images,
            sampler=config.sampler,
            model=(config.model, *config.ensemble)[index // config.num_images],
            init_image=images[config.init_image] if config.init_image else None,
            # As diffusers does: brightness from the middle up is painted.
            mask=mask.mean(axis=2) >= 127.5 if mask is not None else None,
            strength=config.strength,
            loras=tuple((lora.name, lora.weight) for lora in config.loras),
            controls=tuple(
                ControlInput(name=c.name, image=images[c.image], scale=c.scale, start=c.start, end=c.end)
                for c in config.controls
            ),
            refiner=config.refiner.model if config.refiner else None,
            refiner_start=config.refiner.start if config.refiner else 0.8,
            preview_every=config.preview_every,
            num_frames=config.num_frames,
            fps=config.fps,
            audio_seconds=config.audio_seconds,
            images=tuple(images[name] for name in config.images),
            control_image=images[config.control_image] if config.control_image else None,
            parameters=config.parameters,
            output_format=config.output_format,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Generated:
    """A finished image. `timings` are the seconds of wait (for admission), encode, denoise and decode.

    A video has `frames` and a 3D object a `mesh`, each with an `image` that represents it.
    """

    request_id: str
    image: np.ndarray  # uint8 (H, W, 3)
    seed: int
    steps_taken: int  # network evaluations
    timings: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    frames: np.ndarray | None = None  # uint8 (F, H, W, 3)
    mesh: Mesh | None = None
    audio: Audio | None = None
    fps: float | None = None  # of the frames; None: the format's default
    accelerations: tuple[str, ...] = ()  # accelerations that cost likeness, see docs/accelerations.md


@dataclass(frozen=True, kw_only=True, eq=False)
class Mesh:
    """Triangles with colors."""

    vertices: np.ndarray  # float32 (V, 3)
    faces: np.ndarray  # int64 (F, 3)
    colors: np.ndarray  # uint8 (V, 3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Audio:
    """Sound."""

    samples: np.ndarray  # float32 (channels, N) in -1..1
    rate: int  # samples per second
