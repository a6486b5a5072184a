"""`Average`: an exponential moving average of a module's weights, which samples better than the last weights."""

from __future__ import annotations

import torch
from torch import nn


class Average:
    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().float().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Add the module's current weights. Early updates count more, so that the initial weights soon fade."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value.float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(
            {name: self.weights[name].to(value.dtype) for name, value in module.state_dict().items()}
        )
