"""`WholePipeline`: what the adapters around whole diffusers pipelines share: samplers, refusals, where weights live."""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.base import Watch
from calotype_worker.request import Generated, GenerationRequest
from calotype_worker.sampling.samplers import Sampler, make_scheduler, sampler_of


class WholePipeline(ABC):
    """The common half of an `OpaqueModel`. It owns its pipeline: nobody else may run or change it.

    A run puts a fresh scheduler into the pipeline, so that nothing of one run is left for the next.
    """

    samplers: ClassVar[Mapping[Any, Sampler]]

    @classmethod
    @abstractmethod
    def card_of(cls, name: str, pipeline: Any, notes: Mapping[str, Any], version: str) -> ModelCard:
        """The model's card, from the pipeline's own configs and the operator's `notes`."""

    @abstractmethod
    def batch_key(self, request: GenerationRequest) -> tuple[Any, ...]:
        """What requests must share to run together. Any thread. Raises InvalidRequest if this model cannot do it."""

    @abstractmethod
    def run(self, requests: Sequence[GenerationRequest], watch: Watch) -> Sequence[Generated | None]:
        """Make them all; None for those that `watch` says were cancelled meanwhile. All share one `batch_key`."""

    def __init__(
        self, pipeline: Any, *, card: ModelCard, device: torch.device, dtype: torch.dtype, max_batch: int
    ) -> None:
        """`pipeline` was loaded in `dtype`; its parts are moved to `device`."""
        self.card = card
        self.device = device
        self.dtype = dtype
        self.max_batch = max_batch
        self._pipeline = pipeline
        self._scheduler_config = dict(pipeline.scheduler.config)
        # A fast tokenizer refuses two threads at once: the pipeline's is the engine's thread's, this is the others'.
        self._shared_tokenizer = copy.deepcopy(pipeline.tokenizer)
        self._shared_tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self._lock = threading.Lock()
        pipeline.set_progress_bar_config(disable=True)
        for part in self._parts:
            part.eval()
        self.to(device)

    def total_steps(self, request: GenerationRequest) -> int:
        return len(self._make_scheduler(request).timesteps)

    def to(self, device: torch.device) -> None:
        for part in self._parts:
            part.to(device)

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for part in self._parts for p in part.parameters())

    @property
    def _parts(self) -> list[torch.nn.Module]:
        return [part for part in self._pipeline.components.values() if isinstance(part, torch.nn.Module)]

    def _make_scheduler(self, request: GenerationRequest) -> Any:
        return make_scheduler(
            request.sampler, self._scheduler_config, request.num_inference_steps, samplers=self.samplers
        )

    def _check(self, request: GenerationRequest) -> None:
        """Refuse what no whole pipeline here can do; without this a request would be made without it.

        Raises:
            InvalidRequest: it asks for a source image, adapters or previews, for a sampler or a number of steps
                that this model lacks, or its prompt is longer than the text encoder reads.
        """
        for field, value in (
            ("init_image", request.init_image is not None),
            ("mask_image", request.mask is not None),
            ("loras", [name for name, _ in request.loras]),
            ("controls", [control.name for control in request.controls]),
            ("refiner", request.refiner),
            ("preview_every", request.preview_every),
        ):
            if value:
                raise self._unable(field, value)
        self._make_scheduler(request)
        for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            self._check_length(field, text)

    def _check_length(self, field: str, text: str) -> None:
        with self._lock:
            tokens = len(self._shared_tokenizer(text).input_ids)
        if tokens > self.card.max_prompt_tokens:
            raise InvalidRequest(
                f"is {tokens} tokens long, and model {self.card.name!r} reads at most {self.card.max_prompt_tokens}",
                field=field,
                value=text,
                remedy="shorten it",
            )

    def _unable(self, field: str, value: object) -> InvalidRequest:
        return InvalidRequest(
            f"model {self.card.name!r} cannot be stepped and does not support this",
            field=field,
            value=value,
            remedy=f"leave it out; the model supports {', '.join(sorted(self.card.features))}",
        )


def samplers_of(pipeline: Any, samplers: Mapping[Any, Sampler]) -> tuple[str, ...]:
    """The names of `samplers` for a card, the one that the pipeline came with first."""
    own = sampler_of(pipeline.scheduler, samplers)
    return tuple(sampler.value for sampler in sorted(samplers, key=lambda sampler: sampler is not own))


def sizes_of(notes: Mapping[str, Any], default: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Native (width, height) in pixels: those of the operator's notes, or `default`."""
    return tuple((int(width), int(height)) for width, height in notes.get("native_sizes", default))


def own_generators(requests: Sequence[GenerationRequest]) -> list[torch.Generator]:
    """A CPU generator for each request, so that its noise depends on no neighbour and no device."""
    return [torch.Generator().manual_seed(request.seed) for request in requests]
