"""`Decoder`: finished latents wait here for company, and become pictures a few at a time between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from calotype_shared.errors import GenerationFailed
from calotype_worker.engine.split import run_splitting
from calotype_worker.models.base import StepModel


@dataclass(kw_only=True, eq=False)
class Finished:
    request_id: str
    latents: torch.Tensor  # (C, h, w) float32
    turns: int = 0  # turns of the loop it has waited


class Decoder:
    """Owned by the engine's thread. Decodes `batch` latents of one shape together, or fewer after `patience` turns."""

    def __init__(self, model: StepModel, *, batch: int, patience: int) -> None:
        self._model = model
        self._batch = batch
        self._patience = patience
        self._pending: dict[torch.Size, list[Finished]] = {}

    def __len__(self) -> int:
        return sum(len(line) for line in self._pending.values())

    def add(self, finished: Finished) -> None:
        self._pending.setdefault(finished.latents.shape, []).append(finished)

    def discard(self, request_id: str) -> None:
        """Forget a request that was cancelled before its decode."""
        for line in self._pending.values():
            line[:] = [finished for finished in line if finished.request_id != request_id]

    def run(self, *, flush: bool) -> list[tuple[str, np.ndarray | Exception]]:
        """Decode at most one batch a shape, whatever is due; all of it on `flush`. Pairs of request id and result."""
        results: list[tuple[str, np.ndarray | Exception]] = []
        for shape, line in list(self._pending.items()):
            for finished in line:
                finished.turns += 1
            while line and (flush or len(line) >= self._batch or line[0].turns > self._patience):
                chosen, line[:] = line[: self._batch], line[self._batch :]
                results += zip([f.request_id for f in chosen], run_splitting(chosen, self._decode), strict=True)
            if not line:
                del self._pending[shape]
        return results

    def _decode(self, chosen: Sequence[Finished]) -> list[np.ndarray]:
        latents = torch.stack([finished.latents for finished in chosen])
        if not latents.isfinite().all():
            # Found one by one when the batch is split, so only the bad one fails.
            raise GenerationFailed(
                "the network's output was not finite (NaN or infinity); "
                "use a lower guidance_scale or another sampler, or run the model in float32 or bfloat16"
            )
        return list(self._model.decode(latents))
