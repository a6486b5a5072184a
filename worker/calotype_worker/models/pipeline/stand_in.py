"""Stand-ins for a pipeline's networks: within a request's greenlet their calls are handed to the engine instead.

A stand-in is an instance of a subclass of the network's own class that shares its `__dict__`, so `isinstance`, configs,
dtypes and hooks are those of the network. Only `__call__`, `encode` and `decode` differ.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from calotype_worker.models.pipeline.thread_state import ThreadState

# Methods that do the work of a network, where its class has them.
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

    @property
    def place(self) -> tuple[str, str]:
        return self.component, self.method

    def function(self) -> Any:
        """What does the work: the real network, or its method."""
        return self.module if self.method == "__call__" else getattr(self.module, self.method)


class CallingGreenlet(greenlet):
    """Runs one request. Its parent gets each `Call` and switches back with the result, or throws what went wrong.

    `state` is what PyTorch keeps per thread or process and what belongs to this request: random numbers, grad mode.
    """

    def __init__(self, run: Any, *, parent: greenlet, seed: int) -> None:
        super().__init__(run, parent)
        self.state = ThreadState.fresh(seed)

    def park(self, call: Call) -> Any:
        """Sleep until the call is done; its result."""
        assert self.parent is not None
        return self.parent.switch(call)

    def resume(self, *values: Any) -> Any:
        """Switch to it, with its own thread state: its next `Call`, or what it returns."""
        with self.state.entered():
            return self.switch(*values)

    def fail(self, error: BaseException) -> Any:
        """Raise where it sleeps: its next `Call`, or what it returns nevertheless."""
        with self.state.entered():
            return self.throw(error)


def stand_in(component: str, module: torch.nn.Module) -> torch.nn.Module:
    """A stand-in for a network. Outside of a request's greenlet it calls the network itself."""
    kind: Any = type(module)
    methods: dict[str, Any] = {
        name: _parking(component, module, name) for name in METHODS if callable(getattr(kind, name, None))
    }
    # The engine decides where weights are: moving or casting a stand-in would move those of all requests.
    methods["_apply"] = lambda self, *args, **kwargs: self
    methods["to"] = lambda self, *args, **kwargs: self
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: torch.nn.Module = object.__new__(type(kind.__name__, (kind,), {**names, **methods}))
    made.__dict__ = module.__dict__
    return made


def _parking(component: str, module: torch.nn.Module, method: str) -> Any:
    @functools.wraps(getattr(type(module), method))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if not isinstance(current, CallingGreenlet):
            return (module if method == "__call__" else getattr(module, method))(*args, **kwargs)
        return current.park(
            Call(component=component, method=method, module=module, args=args, kwargs=kwargs, caller=current)
        )

    return call
