"""`Described`: a network call, as used for merging: its arguments, their roles, and what must be equal."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from calotype_worker.models.pipeline.interning import Interning
from calotype_worker.models.pipeline.roles import Arguments, Kind, Place, Role, Roles, size_of
from calotype_worker.models.pipeline.stand_in import Call
from calotype_worker.models.pipeline.tree import Path

# Arguments that may be padded along dimension 1 if the other argument masks the padding.
_MASKS = ("{}_mask", "{}_masks")
_OTHER_MASKS = {"encoder_hidden_states": ("encoder_attention_mask",), "input_ids": ("attention_mask",)}


@dataclass(frozen=True, kw_only=True)
class Padding:
    """An argument that may be padded with zeros along dimension 1, and its mask."""

    path: Path
    mask: Path | None  # None: the call gives each row's length in another way
    length: int


@dataclass(kw_only=True, eq=False)
class Described:
    """One call, and the keys that decide which others it may be merged with.

    `key` is equal for calls that can be merged with padding, `even` for those that also have equal lengths, `alike` for
    those that also have equal LoRAs, `exact` for those whose scalars are equal as well. `pattern` stays the same from
    step to step.
    """

    call: Call
    arguments: Arguments
    roles: list[tuple[Path, Any, Role]]
    rows: int
    paddings: tuple[Padding, ...]
    key: Hashable
    even: Hashable
    pattern: Hashable
    _interning: Interning
    _exact: Hashable = None

    @property
    def place(self) -> Place:
        return self.call.place

    @property
    def alike(self) -> Hashable:
        return self.even, self.call.caller.loras.key(self.call.component)

    @property
    def exact(self) -> Hashable:
        if self._exact is None:
            scalars = tuple(
                (path, self._interning.number(value)) for path, value, role in self.roles if role.kind is Kind.SCALAR
            )
            self._exact = (self.alike, scalars)
        return self._exact


class Describer:
    """Owned by the engine's thread. Knows the signatures and roles of a pipeline's networks."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        self._interning = Interning()
        self._signatures: dict[Place, Signature | None] = {}

    def describe(self, call: Call) -> Described | None:
        """None: the call does not match its network's signature."""
        signature = self._signature(call)
        arguments = None if signature is None else signature.named(call)
        if signature is None or arguments is None:
            return None
        roles = self._roles.of(call.place, arguments)
        rows = next((size_of(value, role) for _, value, role in roles if role.kind in (Kind.ROWS, Kind.LIST)), 0)
        if not rows:
            return None
        paddings = signature.paddings(roles)
        padded = {padding.path: padding for padding in paddings}
        masks = {padding.mask for padding in paddings if padding.mask is not None}
        loose: list[Hashable] = []
        pattern: list[Hashable] = []
        lengths: list[Hashable] = []
        for path, value, role in roles:
            if path in masks:
                lengths.append((path, value is None))
                continue
            entry = self._entry(path, value, role, rows, padded=path in padded)
            loose.append(entry)
            pattern.append(_without_value(path, value, role, entry))
            if path in padded:
                lengths.append((path, value.shape[1]))
            elif role.kind is Kind.LIST:
                lengths.append((path, tuple(_shape(part) for part in value)))
        settled = call.caller.state.autocast
        base = (call.place, len(call.args), settled)
        key = (*base, tuple(loose))
        return Described(
            call=call,
            arguments=arguments,
            roles=roles,
            rows=rows,
            paddings=paddings,
            key=key,
            even=(key, tuple(lengths)),
            pattern=(*base, tuple(pattern)),
            _interning=self._interning,
        )

    def _entry(self, path: Path, value: Any, role: Role, rows: int, *, padded: bool) -> Hashable:
        if role.kind is Kind.ROWS:
            left_out = {role.dim, 1} if padded else {role.dim}
            shape = tuple(size for d, size in enumerate(value.shape) if d not in left_out)
            # As a fraction: frames folded into the batch are several per row, a broadcast row is less than one.
            return path, role, shape, value.dtype, value.device, value.shape[role.dim] / rows
        if role.kind is Kind.LIST:
            return path, role, len(value) / rows, _kinds(value, self._interning)
        if role.kind is Kind.SCALAR:
            return path, role, value.dtype, value.ndim
        if role.kind in (Kind.SHARED, Kind.VALUE):
            return path, role, self._interning.number(value) if role.kind is Kind.SHARED else _hashable(value)
        return path, role, None if role.kind is Kind.GENERATOR else id(value)

    def _signature(self, call: Call) -> Signature | None:
        if call.place not in self._signatures:
            self._signatures[call.place] = Signature.of(call)
        return self._signatures[call.place]


class Signature:
    """The parameters of a network's method."""

    @classmethod
    def of(cls, call: Call) -> Self | None:
        """None: Python cannot determine them."""
        function = call.module.forward if call.method == "__call__" else getattr(call.module, call.method)
        try:
            return cls(inspect.signature(function))
        except (TypeError, ValueError):
            return None

    def __init__(self, signature: inspect.Signature) -> None:
        kinds = inspect.Parameter
        self._positional = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        names = [
            name for name, p in signature.parameters.items() if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        ]
        self._masks: dict[str, str] = {}
        for name in names:
            candidates = [pattern.format(name) for pattern in _MASKS] + list(_OTHER_MASKS.get(name, ()))
            mask = next((other for other in candidates if other in names), None)
            if mask is not None:
                self._masks[name] = mask
        self._prefixes = tuple(
            name.removesuffix(end) for name in names for end in ("_lens", "_lengths") if name.endswith(end)
        )

    def named(self, call: Call) -> Arguments | None:
        """Its arguments by name; None: they do not match."""
        if len(call.args) > len(self._positional):
            return None
        named = dict(zip(self._positional, call.args, strict=False))
        if named.keys() & call.kwargs.keys():
            return None
        return {**named, **call.kwargs}

    def paddings(self, roles: list[tuple[Path, Any, Role]]) -> tuple[Padding, ...]:
        """The arguments that may be longer in a merged call."""
        at = {path: (value, role) for path, value, role in roles}
        found = []
        for path, value, role in roles:
            name = path[0]
            if len(path) != 1 or role != Role(Kind.ROWS) or not isinstance(name, str) or value.ndim < 2:
                continue
            if name in self._masks:
                mask, _ = at.get((self._masks[name],), (None, None))
                if mask is None or (isinstance(mask, torch.Tensor) and mask.shape == value.shape[:2]):
                    found.append(Padding(path=path, mask=(self._masks[name],), length=value.shape[1]))
            elif value.ndim >= 3 and any(prefix and name.startswith(prefix) for prefix in self._prefixes):
                found.append(Padding(path=path, mask=None, length=value.shape[1]))
        return tuple(found)


def _without_value(path: Path, value: Any, role: Role, entry: Hashable) -> Hashable:
    """The properties of an argument that decide how a network treats it, without its values."""
    if role.kind is Kind.ROWS:
        return path, role, value.dtype, value.ndim
    if role.kind is Kind.LIST:
        return path, role, type(value[0])
    if role.kind is Kind.SHARED:
        return path, role, value.dtype, value.ndim
    if isinstance(value, float):
        return path, role, float
    return entry


def _shape(value: Any) -> Hashable:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _kinds(value: Any, interning: Interning) -> Hashable:
    """What all elements of per-row lists must share: tensors' type and dimensions, other elements' values."""
    kinds = {_kind(part, interning) for part in value}
    return frozenset(kinds)


def _kind(value: Any, interning: Interning) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.ndim
    if isinstance(value, list | tuple):
        return type(value), tuple(_kind(part, interning) for part in value)
    if isinstance(value, Mapping):
        return tuple((key, _kind(part, interning)) for key, part in value.items())
    if isinstance(value, torch.Generator):
        return torch.Generator
    return _hashable(value)


def _hashable(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_hashable, value))
    if isinstance(value, dict):
        return dict, tuple((key, _hashable(part)) for key, part in value.items())
    if isinstance(value, bool | int | float):
        return type(value), value
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
