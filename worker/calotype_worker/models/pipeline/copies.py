"""A request's copy of a pipeline: networks are replaced by stand-ins, and objects with state are copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from calotype_worker.models.pipeline.stand_in import stand_in


class StandIns:
    """The stand-ins of one pipeline's networks. They have no state of a request, so all requests share them."""

    def __init__(
        self,
        pipeline: Any,
        *,
        device: torch.device | None = None,
        place_weights: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`place_weights` brings a component's weights to `device` before each of its calls."""
        _quiet(getattr(pipeline, "_blocks", None))
        self.modules: dict[str, torch.nn.Module] = {}  # the real ones, by name
        self._by_module: dict[int, torch.nn.Module] = {}
        self._upcast: list[torch.nn.Module] = []
        _find_modules(pipeline, "", self.modules)
        for name, module in self.modules.items():
            upcast = _overflows(module)
            if upcast:
                module.to(torch.float32)
                self._upcast.append(module)
            self._by_module[id(module)] = stand_in(
                name, module, upcast=upcast, device=device, place_weights=place_weights
            )
        self._pipeline = pipeline

    def copy(self) -> Any:
        """The pipeline for one request."""
        return _Copy(self._by_module).of(self._pipeline)

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """Within the block, the networks have the precision in which the pipeline was loaded."""
        for module in self._upcast:
            module.to(torch.float16)
        try:
            yield
        finally:
            for module in self._upcast:
                module.to(torch.float32)


def is_pipeline(value: Any) -> bool:
    """A diffusers pipeline, or one of blocks."""
    return any(base.__name__ in ("DiffusionPipeline", "ModularPipeline") for base in type(value).__mro__)


def is_stateful(value: Any) -> bool:
    """Whether it is a scheduler or guider, which a run changes."""
    if callable(getattr(value, "set_timesteps", None)) and callable(getattr(value, "step", None)):
        return True
    return any(base.__name__ == "BaseGuidance" for base in type(value).__mro__)


def parts(pipeline: Any) -> list[tuple[str, Any]]:
    """Networks, schedulers, tokenizers and other components by name, including those of nested pipelines."""
    found = []
    for name, value in vars(pipeline).items():
        for label, part in _named_parts(name, value):
            if is_pipeline(part):
                found += [(f"{label}.{inner}", own) for inner, own in parts(part)]
            elif part is not None:
                found.append((label, part))
    return found


def _find_modules(pipeline: Any, prefix: str, found: dict[str, torch.nn.Module]) -> None:
    known = {id(module) for module in found.values()}
    for name, value in vars(pipeline).items():
        for label, part in _named_parts(f"{prefix}{name}", value):
            if is_pipeline(part):
                _find_modules(part, f"{label}.", found)
            elif isinstance(part, torch.nn.Module) and id(part) not in known:
                known.add(id(part))
                found[label] = part


def _overflows(module: torch.nn.Module) -> bool:
    """Whether this is an autoencoder whose activations overflow float16.

    Its pipelines cast it to float32 for each call. That would cast it for all requests, so it always stays float32.
    """
    config = getattr(module, "config", None)
    return bool(getattr(config, "force_upcast", False)) and getattr(module, "dtype", None) is torch.float16


def _named_parts(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        return [(f"{name}.{index}", part) for index, part in enumerate(value)]
    if isinstance(value, Mapping) and not name.rpartition(".")[2].startswith("_"):
        return [(f"{name}.{key}", part) for key, part in value.items()]
    return [(name, value)]


class _Copy:
    def __init__(self, stand_ins: Mapping[int, torch.nn.Module]) -> None:
        self._stand_ins = stand_ins
        self._made: dict[int, Any] = {}  # objects that nested pipelines share stay shared in the copy

    def of(self, pipeline: Any) -> Any:
        if id(pipeline) in self._made:
            return self._made[id(pipeline)]
        made = object.__new__(type(pipeline))
        self._made[id(pipeline)] = made
        # Not by setattr, which a pipeline answers by rewriting its config.
        made.__dict__.update({name: self._value(value) for name, value in vars(pipeline).items()})
        made.__dict__["_progress_bar_config"] = {"disable": True}
        # The engine decides where weights are; hooks that move them would affect other requests, too.
        made.__dict__["maybe_free_model_hooks"] = _nothing
        return made

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, torch.nn.Module):
            return self._stand_ins.get(id(value), value)
        if is_pipeline(value):
            return self.of(value)
        if is_stateful(value):
            if id(value) not in self._made:
                self._made[id(value)] = copy.deepcopy(value)
            return self._made[id(value)]
        if kind is list or kind is tuple:
            return kind(self._value(part) for part in value)
        if kind is dict:
            return {key: self._value(part) for key, part in value.items()}
        return value


def _quiet(block: Any) -> None:
    """Turn off the progress bars of modular blocks, which have no state otherwise; requests share them."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in getattr(block, "sub_blocks", {}).values():
        _quiet(inner)


def _nothing() -> None:
    return None
