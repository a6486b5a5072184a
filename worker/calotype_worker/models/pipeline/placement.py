"""`Placement`: which of a pipeline's networks are on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.latent import Memory

_CPU = torch.device("cpu")


class Placement:
    """Owned by the engine's thread.

    With offload "model", a network comes to the device before each of its calls, and the one that was used longest ago
    makes room: at once or, if there is a budget, when that is used up. With "sequential", accelerate moves each
    layer.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        device: torch.device,
        memory: Memory,
        *,
        pinned: Sequence[str] = (),
    ) -> None:
        """`pinned`: networks that pipelines use other than by calls; they stay on the device."""
        self._modules = modules
        self._device = device
        self._offload = memory.offload
        self._pinned = frozenset(pinned)
        self._budget = memory.budget or 0
        self._resident: OrderedDict[str, None] = OrderedDict()  # the next to be moved away first; not the pinned

    def settle(self) -> None:
        """Bring them to where they are at first."""
        for name, module in self._modules.items():
            if self._offload == "none" or name in self._pinned:
                module.to(self._device)
            elif self._offload == "sequential":
                from accelerate import cpu_offload  # noqa: PLC0415 - only here

                cpu_offload(module, execution_device=self._device)

    def use(self, name: str) -> None:
        """The network is on the device until another is used."""
        if self._offload != "model" or name in self._pinned:
            return
        if name not in self._resident:
            wanted = size_of(self._modules[name])
            while self._resident and wanted + sum(size_of(self._modules[n]) for n in self._resident) > self._budget:
                other, _ = self._resident.popitem(last=False)
                self._modules[other].to(_CPU)
            self._modules[name].to(self._device)
            self._resident[name] = None
        self._resident.move_to_end(name)

    def to(self, device: torch.device) -> None:
        """Move all networks, for `ModelPool`. Those that are offloaded come back when they are used."""
        if self._offload == "sequential":
            return
        for name, module in self._modules.items():
            if device == _CPU or self._offload == "none" or name in self._pinned:
                module.to(device)
        self._resident.clear()

    @property
    def weight_bytes(self) -> int:
        """The most that is on the device at once."""
        sizes = {name: size_of(module) for name, module in self._modules.items()}
        if self._offload == "none":
            return sum(sizes.values())
        pinned = sum(sizes[name] for name in self._pinned if name in sizes)
        moving = [size for name, size in sizes.items() if name not in self._pinned]
        if self._offload == "sequential":
            layers = [module for network in self._modules.values() for module in network.modules()]
            return pinned + max(
                sum(p.numel() * p.element_size() for p in layer.parameters(recurse=False)) for layer in layers
            )
        return pinned + min(sum(moving), max([self._budget - pinned, *moving]))


def save_memory(model: str, modules: Mapping[str, torch.nn.Module], memory: Memory) -> None:
    """Turn on slicing and tiling where the networks have them.

    Raises:
        ModelLoadError: no network has one that is asked for.
    """
    for asked, method, arguments, option in (
        (memory.attention_slicing, "set_attention_slice", ("auto",), "--attention-slicing"),
        (memory.vae_slicing, "enable_slicing", (), "--vae-slicing"),
        (memory.vae_tiling, "enable_tiling", (), "--vae-tiling"),
    ):
        if asked and not [module for module in modules.values() if _turn_on(module, method, arguments)]:
            raise ModelLoadError(f"model {model!r}: none of its networks supports {option}; leave it out")


def _turn_on(module: torch.nn.Module, method: str, arguments: tuple[str, ...]) -> bool:
    """Call a network's method; whether it has it."""
    try:
        getattr(module, method)(*arguments)
    except (AttributeError, NotImplementedError):  # autoencoders have the methods even where they cannot
        return False
    return True


def size_of(module: torch.nn.Module) -> int:
    """Bytes of its weights."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
