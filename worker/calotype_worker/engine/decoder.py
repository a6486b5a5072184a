"""`Decoder`: holds finished latents for a few steps so that several can be decoded in one VAE call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from calotype_shared.errors import GenerationFailed
from calotype_worker.engine.failure_isolation import run_isolating_failures
from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.models.base import StepModel
from calotype_worker.models.pool import ModelPool


@dataclass(kw_only=True, eq=False)
class Finished:
    request_id: str
    model: str
    latents: torch.Tensor  # (C, h, w) float32
    turns: int = 0  # turns of the loop it has waited


class Decoder:
    """Decodes finished latents, up to `batch` of one model and shape per VAE call. Owned by the engine's thread.

    A latent waits at most `max_wait_steps` iterations of the loop, and only while another one is about to finish.
    `steps_until_next(model, shape)` is the number of steps until the next latent is finished; `limits(kind, batch)`
    returns the memory limit of that kind of decode.
    """

    def __init__(
        self,
        pool: ModelPool,
        *,
        batch: int,
        max_wait_steps: int,
        limits: Callable[[Hashable, int], MemoryLimit],
        steps_until_next: Callable[[str, torch.Size], float],
    ) -> None:
        self._pool = pool
        self._batch = batch
        self._max_wait_steps = max_wait_steps
        self._limits = limits
        self._steps_until_next = steps_until_next
        self._pending: dict[tuple[str, torch.Size], list[Finished]] = {}

    def __len__(self) -> int:
        return sum(len(line) for line in self._pending.values())

    def add(self, finished: Finished) -> None:
        self._pending.setdefault((finished.model, finished.latents.shape), []).append(finished)

    def discard(self, request_id: str) -> None:
        """Remove a request that was cancelled before its decode."""
        for line in self._pending.values():
            line[:] = [finished for finished in line if finished.request_id != request_id]

    def run(self, *, flush: bool) -> list[tuple[str, np.ndarray | Exception]]:
        """Decode whatever is due; all of it on `flush`. Pairs of request id and result."""
        results: list[tuple[str, np.ndarray | Exception]] = []
        for kind, line in list(self._pending.items()):
            for finished in line:
                finished.turns += 1
            wait = self._steps_until_next(*kind)
            while line and (flush or len(line) >= self._batch or line[0].turns - 1 + wait > self._max_wait_steps):
                chosen, line[:] = line[: self._batch], line[self._batch :]
                limit = self._limits(("decode", *kind), self._batch)
                images = run_isolating_failures(chosen, functools.partial(self._decode_within, limit))
                results += zip([f.request_id for f in chosen], images, strict=True)
            if not line:
                del self._pending[kind]
        return results

    def _decode_within(self, limit: MemoryLimit, chosen: Sequence[Finished]) -> list[np.ndarray]:
        return [image for part in limit.run(chosen, self._decode) for image in part]

    def _decode(self, chosen: Sequence[Finished]) -> list[np.ndarray]:
        latents = torch.stack([finished.latents for finished in chosen])
        if not latents.isfinite().all():
            # The batch is then split, so that only the latents at fault fail.
            raise GenerationFailed(
                "the network's output was not finite (NaN or infinity); "
                "use a lower guidance_scale or another sampler, or run the model in float32 or bfloat16"
            )
        model = cast("StepModel", self._pool.use(chosen[0].model))
        return list(model.decode(latents))
