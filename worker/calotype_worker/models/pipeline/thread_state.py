"""`ThreadState`: PyTorch's state per thread or process that each request needs for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(kw_only=True, eq=False)
class ThreadState:
    """Random numbers, grad mode and autocast of one request. Used only by the engine's thread.

    Pipelines that draw without a generator use PyTorch's global one, so each request has its own state of it.
    """

    random: torch.Tensor
    cuda: torch.Tensor | None
    grad: bool = False
    autocast: tuple[bool, torch.dtype, bool, torch.dtype]

    @classmethod
    def fresh(cls, seed: int) -> Self:
        """As in a new process after `torch.manual_seed(seed)`."""
        cuda = None
        if torch.cuda.is_initialized():
            cuda = torch.Generator(device="cuda").manual_seed(seed).get_state()
        return cls(random=torch.Generator().manual_seed(seed).get_state(), cuda=cuda, autocast=_autocast())

    @property
    def draws(self) -> tuple[torch.Tensor, ...]:
        """To see by comparison whether a call drew random numbers."""
        return (self.random,) if self.cuda is None else (self.random, self.cuda)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block, the thread has this state; afterwards, its previous one."""
        outside = ThreadState(
            random=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state() if self.cuda is not None else None,
            grad=torch.is_grad_enabled(),
            autocast=_autocast(),
        )
        self._apply()
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            self.cuda = torch.cuda.get_rng_state() if self.cuda is not None else None
            self.grad = torch.is_grad_enabled()
            self.autocast = _autocast()
            outside._apply()

    def _apply(self) -> None:
        torch.set_rng_state(self.random)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        torch.set_grad_enabled(self.grad)
        if self.autocast != _autocast():
            for device, enabled, dtype in (("cpu", *self.autocast[:2]), ("cuda", *self.autocast[2:])):
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)


def _autocast() -> tuple[bool, torch.dtype, bool, torch.dtype]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )
