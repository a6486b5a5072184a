"""ControlNets (Zhang et al. 2023) for a U-Net, for some rows of a forward pass, with each row's own scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from calotype_worker.models.base import ControlRows, Rows

Residuals = tuple[list[torch.Tensor] | None, torch.Tensor | None]


def control_residuals(
    nets: Mapping[str, Any], rows: Rows, *, dtype: torch.dtype, added: Mapping[str, torch.Tensor] | None = None
) -> Residuals:
    """The sum of all ControlNets' residuals for the U-Net's down blocks and middle block, for all R rows.

    A ControlNet processes only the rows that use it, unless `rows.exact`.
    """
    down: list[torch.Tensor] | None = None
    middle: torch.Tensor | None = None
    for control in rows.controls:
        for length, chosen in _passes(control, rows):
            index = torch.tensor(chosen, device=rows.latents.device)
            new_down, new_middle = _one(nets[control.name], control, rows, index, length, dtype=dtype, added=added)
            if down is None or middle is None:
                down = [part.new_zeros((len(rows.latents), *part.shape[1:])) for part in new_down]
                middle = new_middle.new_zeros((len(rows.latents), *new_middle.shape[1:]))
            for total, part in zip([*down, middle], [*new_down, new_middle], strict=True):
                total.index_add_(0, index, part)
    return down, middle


def _passes(control: ControlRows, rows: Rows) -> Sequence[tuple[int | None, Sequence[int]]]:
    """Rows to run together, with their texts' length if texts differ in length.

    A ControlNet accepts no mask for padded text, so different lengths run separately.
    """
    scales = control.scales.tolist()
    if not any(scales):
        return []
    chosen = [index for index, scale in enumerate(scales) if scale or rows.exact]
    lengths = rows.lengths.get("text")
    if lengths is None:
        return [(None, chosen)]
    return [
        (length, [index for index in chosen if lengths[index] == length])
        for length in sorted({lengths[index] for index in chosen})
    ]


def _one(
    net: Any,
    control: ControlRows,
    rows: Rows,
    index: torch.Tensor,
    length: int | None,
    *,
    dtype: torch.dtype,
    added: Mapping[str, torch.Tensor] | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    down, middle = net(
        rows.latents[index].to(dtype),
        rows.timesteps[index],
        encoder_hidden_states=rows.conditioning["text"][index][:, :length],
        controlnet_cond=control.images[index].to(dtype),
        conditioning_scale=control.scales.to(rows.latents.device, dtype)[index].reshape(-1, 1, 1, 1),
        added_cond_kwargs={key: value[index] for key, value in added.items()} if added else None,
        return_dict=False,
    )
    return list(down), middle
