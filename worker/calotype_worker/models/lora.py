"""LoRAs (Hu et al. 2021), with a separate selection for every row of one forward pass.

A forward hook on each adapted layer adds `weight · scale · up(down(x))` to its output, with `weight` each row's own;
rows without that LoRA have weight 0. Because all rows are processed, a row's bits do not depend on the LoRAs of others,
and the two small products are cheap compared with the layer's. peft's mixed batches allow one adapter per row, at one
fixed weight.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_worker.models.lora_convert import Place
from calotype_worker.models.lora_file import read_layers
from calotype_worker.models.lora_layer import DoesNotFit, LoraLayer, fitted

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """`layers` by component and module path: ("unet", "mid_block.attentions.0.….to_q")."""

    name: str
    layers: Mapping[Place, LoraLayer]

    def touches(self, component: str) -> bool:
        return component in self.patterns

    @functools.cached_property
    def patterns(self) -> Mapping[str, int]:
        """By component: a number that is equal for LoRAs that change the same layers."""
        paths: dict[str, set[str]] = {}
        for component, path in self.layers:
            paths.setdefault(component, set()).add(path)
        return {component: hash(frozenset(found)) for component, found in paths.items()}


class LoraBank:
    """A model's LoRAs: registered by name, loaded on first use, the least recently used evicted. Thread-safe."""

    def __init__(
        self, pipeline: Any, components: Mapping[str, torch.nn.Module], files: Mapping[str, Path], *, capacity: int
    ) -> None:
        """`components` are the adapted modules by the names that LoRA files use: unet, transformer, text_encoder."""
        self._pipeline = pipeline
        self._components = dict(components)
        self._files = dict(files)
        self._capacity = capacity
        self._loaded: OrderedDict[str, Lora] = OrderedDict()
        self._hooked: set[Place] = set()
        self._lock = threading.Lock()
        self._active: Sequence[tuple[Lora, torch.Tensor]] = ()  # the engine's thread

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._files))

    @property
    def loaded(self) -> tuple[str, ...]:
        """The LoRAs in memory, the next to be evicted first."""
        with self._lock:
            return tuple(self._loaded)

    def get(self, name: str) -> Lora:
        """Get the LoRA from memory or its file.

        Raises:
            InvalidRequest: it is not registered for this model.
            ModelLoadError: its file is broken or for another model.
        """
        if name not in self._files:
            raise InvalidRequest(
                "is not a registered LoRA",
                field="loras",
                value=name,
                remedy=f"use one of: {', '.join(self.names) or 'none registered'}; or start the worker with "
                f"--lora {name}=FILE",
            )
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
                log.info("LoRA loaded", extra={"lora": name})
            self._loaded.move_to_end(name)
            while len(self._loaded) > self._capacity:
                evicted, _ = self._loaded.popitem(last=False)
                log.info("LoRA evicted", extra={"lora": evicted})
            return self._loaded[name]

    @contextmanager
    def active(self, chosen: Sequence[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """Within the block every adapted layer applies these: name, and each row's weight (R,) or one for all (1,).

        The engine's thread.
        """
        before = self._active  # nested: a part of the rows may run a part of the network
        self._active = [(self.get(name), weights) for name, weights in sorted(chosen, key=lambda pair: pair[0])]
        try:
            yield
        finally:
            self._active = before

    def check(self) -> None:
        """Check every registered file by its header: keys, shapes, whether it is complete.

        The layers get their hooks here, so that none gets one while its network runs.

        Raises:
            ModelLoadError: a file is missing, broken, or not a LoRA for this model.
        """
        for name in self._files:
            for key, (module, _) in self._fitted(name, values=False).items():
                self._adapt(key, module)

    def _load(self, name: str) -> Lora:
        adapted = {}
        for key, (module, layer) in self._fitted(name, values=True).items():
            adapted[key] = layer
            self._adapt(key, module)
        return Lora(name=name, layers=adapted)

    def _adapt(self, key: Place, module: torch.nn.Module) -> None:
        if key not in self._hooked:
            self._hooked.add(key)
            module.register_forward_hook(self._hook(key), with_kwargs=True)

    def _fitted(self, name: str, *, values: bool) -> dict[Place, tuple[torch.nn.Module, LoraLayer]]:
        """The layers of a file with their modules. Without `values` the layers have shapes alone."""
        path = self._files[name]
        layers = read_layers(name, self._pipeline, path, self._components, values=values)
        found = {}
        for (component, written_path), layer in layers.items():
            place = f"layer {component}.{written_path}"
            at = _find(self._components[component], written_path)
            if at is None:
                raise ModelLoadError(
                    f"LoRA {name!r}: {place} does not exist in this model; use one that was trained for it"
                )
            try:
                found[component, at[0]] = at[1], fitted(at[1], layer)
            except DoesNotFit as error:
                raise ModelLoadError(
                    f"LoRA {name!r}: {place} does not fit this model: {error}; use one that was trained for it"
                ) from error
        return found

    def _hook(self, key: Place) -> Any:
        def add(
            module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: torch.Tensor
        ) -> torch.Tensor:
            own = output
            for lora, weights in self._active:
                layer = lora.layers.get(key)
                if layer is not None:
                    output = output + layer.change(module, args[0] if args else kwargs["input"], own, weights)
            return output

        return add


def _find(root: torch.nn.Module, path: str) -> tuple[str, torch.nn.Module] | None:
    """The module and its path: transformers 5 has removed the prefix `text_model.` that files still contain."""
    for candidate in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        try:
            return candidate, root.get_submodule(candidate)
        except AttributeError:
            continue
    return None
