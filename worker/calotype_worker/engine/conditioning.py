"""`ConditioningCache`: text embeddings of recent prompts, on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from calotype_worker.engine.failure_isolation import run_isolating_failures
from calotype_worker.models.base import Conditioning, StepModel, Text


class ConditioningCache:
    """Evicts the least recently used entries. Owned by the engine's thread.

    `together` encodes new prompts in one call. Without it they are encoded one by one, so that the bits of a prompt's
    conditioning do not depend on other prompts.
    """

    def __init__(self, *, capacity: int, together: bool) -> None:
        self._capacity = capacity
        self._together = together
        self._cache: OrderedDict[tuple[str, Text], Conditioning] = OrderedDict()

    def encode(self, model: StepModel, texts: Iterable[Text]) -> Mapping[Text, Conditioning | Exception]:
        """The conditioning of each text by this model, or the error that encoding it raised."""
        name = model.card.name
        wanted = sorted(set(texts))
        missing = [text for text in wanted if (name, text) not in self._cache]
        found: dict[Text, Conditioning | Exception] = {
            text: self._cache[name, text] for text in wanted if (name, text) in self._cache
        }
        chunks = [missing] if self._together else [[text] for text in missing]
        for chunk in filter(None, chunks):
            found |= dict(zip(chunk, run_isolating_failures(chunk, model.encode), strict=True))
        for text, conditioning in found.items():
            if not isinstance(conditioning, Exception):
                self._cache[name, text] = conditioning
                self._cache.move_to_end((name, text))
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return found
