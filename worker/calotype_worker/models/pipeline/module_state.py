"""`ModuleState`: what of a pipeline's networks a run may change: processors, hooks, `forward`, training mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OWN = ("processor", "forward", "training", "_hf_hook")


class ModuleState:
    """Pipelines of perturbed attention and the like replace attention processors while they run. Requests that share
    these networks would get them, too, so such pipelines run one request at a time."""

    def __init__(self, found: list[tuple[str, torch.nn.Module, dict[str, Any], int]]) -> None:
        self._found = found

    @classmethod
    def of(cls, modules: Mapping[str, torch.nn.Module]) -> Self:
        return cls(
            [
                (f"{component}.{name}".rstrip("."), module, _state(module), len(module._modules))
                for component, top in modules.items()
                for name, module in top.named_modules()
            ]
        )

    def difference(self) -> str:
        """The first module that is not as it was; empty if there is none."""
        for name, module, state, count in self._found:
            now = _state(module)
            if now.keys() != state.keys() or len(module._modules) != count:
                return name
            for key, value in state.items():
                if now[key] is not value and (key not in _HOOKS or now[key] != value):
                    return f"{name} ({key})"
        return ""

    def restore(self) -> None:
        """Put back what was replaced."""
        for _, module, state, _ in self._found:
            for key in _HOOKS:
                current = getattr(module, key)
                if current != state[key]:
                    current.clear()
                    current.update(state[key])
            for key in _OWN:
                place = module._modules if key in module._modules else module.__dict__
                if key not in state:
                    place.pop(key, None)
                elif place.get(key) is not state[key]:
                    place[key] = state[key]


def _state(module: torch.nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {key: dict(module.__dict__[key]) for key in _HOOKS}
    for key in _OWN:
        if key in module.__dict__:
            found[key] = module.__dict__[key]
        elif key in module._modules:
            found[key] = module._modules[key]
    return found
