"""Arguments and results of network calls as trees: iterating over leaves and replacing them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

Path = tuple[str | int, ...]


def leaves(
    value: Any, path: Path = (), *, whole: frozenset[Path] | set[Path] = frozenset()
) -> Iterator[tuple[Path, Any]]:
    """Each leaf and its path.

    Dicts, lists and tuples are branches, unless they are empty or their path is in `whole`.
    """
    kind = type(value)
    if kind not in (dict, list, tuple) or not value or path in whole:
        yield path, value
    elif kind is dict:
        for key, part in value.items():
            yield from leaves(part, (*path, key), whole=whole)
    else:
        for index, part in enumerate(value):
            yield from leaves(part, (*path, index), whole=whole)


def rebuilt(value: Any, found: dict[Path, Any], path: Path = ()) -> Any:
    """The same tree, with the leaves or branches of `found` replaced.

    Branches are always copied: a network may remove items from the lists that it is given.
    """
    if path in found:
        return found[path]
    kind = type(value)
    if kind is dict:
        return {key: rebuilt(part, found, (*path, key)) for key, part in value.items()}
    if kind is list or kind is tuple:
        return kind(rebuilt(part, found, (*path, index)) for index, part in enumerate(value))
    return value


def children(value: Any) -> list[tuple[str | int, Any]] | None:
    """The parts of a result, or None for a leaf.

    Branches are dicts, lists, tuples, the output classes of diffusers and transformers, and objects that hold tensors,
    such as distributions and caches.
    """
    if isinstance(value, torch.Tensor | torch.nn.Module | str | bytes | type) or value is None or callable(value):
        return None
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if hasattr(value, "__dict__") and vars(value):
        return list(vars(value).items())
    return None


def with_children(value: Any, change: Callable[[str | int, Any], Any]) -> Any:
    """A copy of a result with `change` applied to each part."""
    if isinstance(value, dict):
        made = copy.copy(value)
        for key, part in value.items():
            made[key] = change(key, part)
        return made
    if isinstance(value, list | tuple):
        parts = [change(index, part) for index, part in enumerate(value)]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*parts)
        return type(value)(parts)
    made = object.__new__(type(value))
    made.__dict__.update({key: change(key, part) for key, part in vars(value).items()})
    return made
