"""Stand-ins for a pipeline's networks: within a request's greenlet, their calls are passed to the engine.

A stand-in is an instance of a subclass of the network's own class that shares its `__dict__`, so `isinstance`, configs,
dtypes and hooks are those of the network. Only `__call__`, `encode` and `decode` differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from calotype_worker.models.pipeline.adapters import NO_LORAS
from calotype_worker.models.pipeline.module_state import Change, ModuleState, put_in, restore
from calotype_worker.models.pipeline.thread_state import ThreadState
from calotype_worker.models.pipeline.tree import leaves, rebuilt

# Methods that run a network, if its class has them.
METHODS = ("__call__", "encode", "decode")


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A network call that waits for its result."""

    component: str
    method: str  # of METHODS
    module: torch.nn.Module  # the real one
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    caller: CallingGreenlet
    place_weights: Callable[[str], None] = lambda _: None  # brings a component's weights to the device

    @property
    def place(self) -> tuple[str, str]:
        return self.component, self.method

    def function(self) -> Any:
        """The callable to run: the real network, or its method. Its weights are on the device from now on."""
        self.place_weights(self.component)
        return self.module if self.method == "__call__" else getattr(self.module, self.method)


class CallingGreenlet(greenlet):
    """Runs one request. Its parent gets each `Call` and switches back with the result, or throws the error.

    `state` is this request's own copy of PyTorch's state per thread or process: random numbers, grad mode.
    """

    def __init__(self, run: Any, *, parent: greenlet, seed: int, watched: ModuleState | None = None) -> None:
        """`watched`: the networks' state for all other requests, if this run may change it."""
        super().__init__(run, parent)
        self.state = ThreadState.fresh(seed)
        self.changes: Sequence[Change] = ()  # of the networks, by this run
        self.loras = NO_LORAS
        self._watched = watched

    def park(self, call: Call) -> Any:
        """Sleep until the call is done; its result."""
        assert self.parent is not None
        return self.parent.switch(call)

    def resume(self, *values: Any) -> Any:
        """Continue it with its own thread state. Returns its next `Call`, or its result."""
        with self.entered():
            return self.switch(*values)

    def fail(self, error: BaseException) -> Any:
        """Raise an error where it is suspended. Returns its next `Call`, or its result if it returns nevertheless."""
        with self.entered():
            return self.throw(error)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block, thread and networks have the state that this run left."""
        with self.state.entered():
            put_in(self.changes)
            try:
                yield
            finally:
                if self._watched is not None:
                    self.changes = self._watched.take_out()

    @contextmanager
    def calling(self) -> Iterator[None]:
        """The same for a network call. A network's own changes are kept: some add hooks when they first run."""
        with self.state.entered():
            put_in(self.changes)
            try:
                yield
            finally:
                if self.changes:
                    restore(self.changes)
                if self._watched is not None:
                    self._watched.refresh()


def stand_in(
    component: str,
    module: torch.nn.Module,
    *,
    upcast: bool = False,
    device: torch.device | None = None,
    place_weights: Callable[[str], None] = lambda _: None,
) -> torch.nn.Module:
    """A stand-in for a network. Outside a request's greenlet, it calls the network itself.

    `device`: it appears to be there, wherever its weights are until `place_weights` brings them.
    `upcast`: the network is in float32, but appears to pipelines as the float16 one that they would cast to
    float32 for each of its calls.
    """
    kind: Any = type(module)
    methods: dict[str, Any] = {
        name: _parking(component, module, name, upcast=upcast, place_weights=place_weights)
        for name in METHODS
        if callable(getattr(kind, name, None))
    }
    if upcast:
        methods["dtype"] = property(lambda self: torch.float16)
    if device is not None:
        methods["device"] = property(lambda self: device)
    # The engine decides where weights are: moving or casting a stand-in would affect all requests.
    methods["_apply"] = lambda self, *args, **kwargs: self
    methods["to"] = lambda self, *args, **kwargs: self
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: torch.nn.Module = object.__new__(type(kind.__name__, (kind,), {**names, **methods}))
    made.__dict__ = module.__dict__
    return made


def _parking(
    component: str, module: torch.nn.Module, method: str, *, upcast: bool, place_weights: Callable[[str], None]
) -> Any:
    @functools.wraps(getattr(type(module), method))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if not isinstance(current, CallingGreenlet):
            place_weights(component)
            return (module if method == "__call__" else getattr(module, method))(*args, **kwargs)
        if upcast:
            args, kwargs = _float32(args), _float32(kwargs)
        return current.park(
            Call(
                component=component,
                method=method,
                module=module,
                args=args,
                kwargs=kwargs,
                caller=current,
                place_weights=place_weights,
            )
        )

    return call


def _float32(value: Any) -> Any:
    found = {
        path: leaf.float()
        for path, leaf in leaves(value)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    }
    return rebuilt(value, found)
