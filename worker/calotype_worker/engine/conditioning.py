"""`ConditioningCache`: text embeddings of recent prompts, on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch

from calotype_worker.engine.split import run_splitting
from calotype_worker.models.base import StepModel


class ConditioningCache:
    """Least recently used out first. Owned by the engine's thread.

    `together` encodes new prompts in one call; without it one by one, which gives the same bits in any company.
    """

    def __init__(self, model: StepModel, *, capacity: int, together: bool) -> None:
        self._model = model
        self._capacity = capacity
        self._together = together
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    def encode(self, prompts: Iterable[str]) -> Mapping[str, torch.Tensor | Exception]:
        """Conditioning (tokens, features) of each prompt, or what its encoding raised."""
        wanted = sorted(set(prompts))
        missing = [prompt for prompt in wanted if prompt not in self._cache]
        found: dict[str, torch.Tensor | Exception] = {p: self._cache[p] for p in wanted if p in self._cache}
        chunks = [missing] if self._together else [[prompt] for prompt in missing]
        for chunk in filter(None, chunks):
            # Rows of one result are views of it; a clone lets the others' memory go when they leave the cache.
            results = run_splitting(chunk, lambda texts: [row.clone() for row in self._model.encode(texts)])
            found |= dict(zip(chunk, results, strict=True))
        for prompt, conditioning in found.items():
            if isinstance(conditioning, torch.Tensor):
                self._cache[prompt] = conditioning
                self._cache.move_to_end(prompt)
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return found
