"""LoRAs of requests of a pipeline: which ones a network call uses, alone or merged with calls that use others."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.embeddings import load_embeddings
from calotype_worker.models.latent import Adapters
from calotype_worker.models.lora import LoraBank


@dataclass(frozen=True, kw_only=True)
class RequestLoras:
    """The LoRAs of one request. They act on the rows of its own calls only."""

    bank: LoraBank | None = None
    chosen: tuple[tuple[str, float], ...] = ()  # name, weight
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by component and name
    patterns: Mapping[str, frozenset[int]] = field(default_factory=dict)  # by component: the layers that they change

    def key(self, component: str) -> Hashable:
        """Equal for requests whose LoRAs change this network equally."""
        return tuple(sorted(self.weights.get(component, {}).items()))

    def active(self) -> AbstractContextManager[None]:
        """Within the block all networks have them, for all rows."""
        return nullcontext() if self.bank is None else self.bank.active(_for_all_rows(self.chosen))


NO_LORAS = RequestLoras()


def loras_of(bank: LoraBank, chosen: Sequence[tuple[str, float]]) -> RequestLoras:
    """The LoRAs that a request names, with their weights.

    Raises:
        InvalidRequest: one is not registered.
    """
    weights: dict[str, dict[str, float]] = {}
    patterns: dict[str, frozenset[int]] = {}
    for name, weight in chosen:
        for component, pattern in bank.get(name).patterns.items():
            weights.setdefault(component, {})[name] = weight
            patterns[component] = patterns.get(component, frozenset()) | {pattern}
    return RequestLoras(bank=bank, chosen=tuple(chosen), weights=weights, patterns=patterns)


def _for_all_rows(chosen: Sequence[tuple[str, float]]) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.tensor([weight])) for name, weight in chosen]


def active_together(
    calls: Sequence[tuple[RequestLoras, int]], component: str, module: torch.nn.Module
) -> AbstractContextManager[None]:
    """Within the block each call's LoRAs act on its own rows of a merged call; given are each call's LoRAs and rows.

    If all calls have the same, they act on whatever the network computes, even if it has no rows.
    """
    if mixed_layers([(loras, component) for loras, _ in calls]) is None:
        return calls[0][0].active()
    bank = next(loras.bank for loras, _ in calls if loras.bank is not None)
    names = sorted({name for loras, _ in calls for name in loras.weights.get(component, {})})
    device = next(module.parameters()).device
    return bank.active(
        [
            (
                name,
                torch.tensor(
                    [loras.weights.get(component, {}).get(name, 0.0) for loras, rows in calls for _ in range(rows)],
                    device=device,
                ),
            )
            for name in names
        ]
    )


def mixed_layers(calls: Sequence[tuple[RequestLoras, str]]) -> Hashable:
    """Which layers have another LoRA for each row, for calls of one component; None: all calls have the same."""
    if len({loras.key(component) for loras, component in calls}) == 1:
        return None
    return frozenset(pattern for loras, component in calls for pattern in loras.patterns.get(component, ()))


def load_words(name: str, pipeline: Any, adapters: Adapters) -> None:
    """Add the registered textual inversions to the pipeline's text encoders.

    Raises:
        ModelLoadError: its class takes none, or a file is broken or for another model.
    """
    if adapters.embeddings and not hasattr(pipeline, "load_textual_inversion"):
        raise ModelLoadError(
            f"model {name!r}: {type(pipeline).__name__} takes no textual inversions; leave out --embedding, or "
            "register them for another model: --embedding MODEL/TOKEN=FILE"
        )
    load_embeddings(pipeline, adapters.embeddings)


def load_loras(name: str, pipeline: Any, modules: Mapping[str, torch.nn.Module], adapters: Adapters) -> LoraBank:
    """The LoRAs that were registered for a pipeline, each file checked.

    Raises:
        ModelLoadError: its class takes none, or a file is broken or for another model.
    """
    loadable = getattr(pipeline, "_lora_loadable_modules", ()) if hasattr(pipeline, "load_lora_weights") else ()
    components = {part: modules[part] for part in loadable if part in modules}
    if adapters.loras and not components:
        raise ModelLoadError(
            f"model {name!r}: {type(pipeline).__name__} takes no LoRAs; leave out --lora, or register them for another "
            "model: --lora MODEL/NAME=FILE"
        )
    bank = LoraBank(pipeline, components, adapters.loras, capacity=adapters.lora_capacity)
    bank.check()
    return bank
