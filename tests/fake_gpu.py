"""A GPU that is not there: tensors that say they live on another device, with their numbers in main memory.

Everything is computed for real. What a GPU would refuse is refused, an operator over tensors of both devices, and what
it would make the host wait for is noted: a number that is asked for, a tensor that is fetched.

PyTorch lets `lazy`, a device type of its own that nothing here uses, stand for it; `cuda` wants a CUDA build.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("lazy")
_HERE = torch.device("cpu")
_ASKING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"}
_COPYING = {"aten::copy_", "aten::_to_copy"}

_lock = threading.Lock()
_inside = 0  # threads


class DeviceTensor(torch.Tensor):
    """Looks like a tensor on the GPU; `near` has its numbers."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=GPU,
        )
        made.near = near
        return made

    def __init__(self, near: torch.Tensor) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func}: there is no GPU outside of `pretended_gpu`")

    def tolist(self) -> Any:
        return [row.tolist() if row.dim() else row.item() for row in self] if self.dim() else self.item()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a GPU's tensor to numpy; use .cpu() first")


class Pretending(TorchDispatchMode):
    """Makes what is asked for on `GPU`, and notes in `waits` what the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode operators come here before they are taken apart
            parts = func.decompose(*args, **kwargs)
        return _run(func, args, kwargs, self.waits) if parts is NotImplemented else parts


@contextmanager
def pretended_gpu() -> Iterator[Pretending]:
    """For the thread that enters it; several may. Modules move there, too, for all of them."""
    _count_in(1)
    try:
        with Pretending() as pretending:
            yield pretending
    finally:
        _count_in(-1)


def _count_in(change: int) -> None:
    """What PyTorch keeps for the whole process is so while any thread is inside."""
    global _inside  # noqa: PLW0603
    with _lock:
        _inside += change
        torch.__future__.set_overwrite_module_params_on_conversion(_inside > 0)
        torch._C._set_only_lift_cpu_tensors(_inside > 0)  # torch.tensor(…, device=…) makes one here, and then moves it


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str]) -> Any:
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device).type == GPU.type
        kwargs = {**kwargs, "device": _HERE}
    else:
        there = isinstance(args[0], DeviceTensor) if name == "aten::copy_" else bool(on_device)
    if on_device:
        _check(name, tensors, waits, fetched=not there)
    result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    if name.endswith("_"):  # in place
        return args[0]
    return tree_map(lambda leaf: DeviceTensor(leaf) if there and isinstance(leaf, torch.Tensor) else leaf, result)


def _check(name: str, tensors: list[torch.Tensor], waits: list[str], *, fetched: bool) -> None:
    masked = name in _INDEXING and any(tensor.dtype == torch.bool for tensor in tensors[1:])
    if name in _ASKING or masked or fetched:
        waits.append(name)
    others = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim()]
    allowed = name in _COPYING or (name in _INDEXING and isinstance(tensors[0], DeviceTensor))
    if others and not allowed:
        raise RuntimeError(f"{name}: tensors on two devices; those of shapes {others} are on the CPU")


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, DeviceTensor) else leaf
