"""`ModuleState`: the state of networks that a run may change: processors, hooks, `forward`, training mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OWN = ("processor", "forward", "training", "_hf_hook")
_Entry = tuple[str, Any]  # which of the module's dicts holds it, and the value


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """One attribute of one module as set by a run; `entry` None: deleted."""

    name: str  # of the module
    module: torch.nn.Module
    key: str
    entry: _Entry | None
    base: _Entry | None  # as other runs need it


class ModuleState:
    """What one run has changed in networks that all requests share.

    Pipelines with perturbed attention, for example, replace attention processors while they run. The changes are
    removed when the run is suspended and put back for its own calls only.
    """

    def __init__(self, found: Sequence[tuple[str, torch.nn.Module, Mapping[str, _Entry]]]) -> None:
        self._found = list(found)

    @classmethod
    def of(cls, modules: Mapping[str, torch.nn.Module]) -> Self:
        """As the networks are now."""
        return cls(
            [
                (f"{component}.{name}".rstrip("."), module, _state(module))
                for component, top in modules.items()
                for name, module in top.named_modules()
            ]
        )

    def refresh(self) -> None:
        """Take the networks' current state as the base."""
        self._found = [(name, module, _state(module)) for name, module, _ in self._found]

    def take_out(self) -> list[Change]:
        """Undo the changes since then, and return them."""
        changes = []
        for name, module, state in self._found:
            now = _state(module)
            for key in now.keys() | state.keys():
                own = now.get(key)
                if not _same(key, own, state.get(key)):
                    changes.append(Change(name=name, module=module, key=key, entry=own, base=state.get(key)))
                    _set(module, key, state.get(key))
        return changes


def put_in(changes: Sequence[Change]) -> None:
    """Apply removed changes again."""
    for change in changes:
        _set(change.module, change.key, change.entry)


def restore(changes: Sequence[Change]) -> None:
    """Remove changes again."""
    for change in changes:
        _set(change.module, change.key, change.base)


def _state(module: torch.nn.Module) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {key: ("hooks", dict(module.__dict__[key])) for key in _HOOKS}
    for key in _OWN:
        if key in module.__dict__:
            found[key] = ("own", module.__dict__[key])
        elif key in module._modules:
            found[key] = ("modules", module._modules[key])
    return found


def _same(key: str, left: _Entry | None, right: _Entry | None) -> bool:
    if left is None or right is None:
        return left is right
    return left[1] == right[1] if key in _HOOKS else left[1] is right[1]


def _set(module: torch.nn.Module, key: str, entry: _Entry | None) -> None:
    if key in _HOOKS:
        hooks = module.__dict__[key]
        hooks.clear()
        hooks.update({} if entry is None else entry[1])
        return
    module.__dict__.pop(key, None)
    module._modules.pop(key, None)
    if entry is not None:
        (module._modules if entry[0] == "modules" else module.__dict__)[key] = entry[1]
