"""`LoraLayer`: the change of one module's output by a LoRA or one of its relatives, with each row's own weight.

Everything that is linear in the weight is a pair of matrices or one whole matrix: LoRA (Hu et al. 2021), LoCon, LoHa
and LoKr (Yeh et al. 2023). DoRA (Liu et al. 2024) also scales each output of the layer, by a factor that depends on the
weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from calotype_worker.models.lora_convert import FileLayer

_NORMS = (torch.nn.LayerNorm, torch.nn.GroupNorm)
_DIMENSION = 4  # of a convolution's weight


class DoesNotFit(Exception):
    """The layer is not for this module; the message says what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Dora:
    """The norms of W + s·BA over each output's weights, for any s: ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖². Each (out,)."""

    magnitude: torch.Tensor
    square: torch.Tensor
    cross: torch.Tensor
    own_square: torch.Tensor
    fixed: bool  # kohya's: the weight blends the whole change, which was computed at weight 1

    def factor(self, scales: torch.Tensor) -> torch.Tensor:
        """(R, out), by which outputs are multiplied, at each row's s (R,)."""
        s = scales.to(self.square).reshape(-1, 1)
        return self.magnitude / (self.square + 2 * s * self.cross + s**2 * self.own_square).sqrt()


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """`down` alone is a whole matrix: the change of the module's weight."""

    down: torch.Tensor | None = None  # (r, in), (r, in, k, k), or the module's weight's shape
    up: torch.Tensor | None = None  # (out, r) or (out, r, 1, 1)
    scale: float = 1.0  # alpha / r
    bias: torch.Tensor | None = None  # (out,), multiplied by scale
    dora: Dora | None = None
    norm: tuple[torch.Tensor, torch.Tensor | None] | None = None  # changes of a norm's weight and bias

    def change(self, module: Any, inputs: torch.Tensor, output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What to add to the module's own `output` for these inputs; `weights` are the rows' (R,)."""
        rows = _each(weights, output)  # shaped to multiply the output
        if self.norm is not None:
            return rows * _normalized(module, inputs, *self.norm)
        added = torch.zeros_like(output)
        factor = _each(weights * self.scale, output)
        if self.down is not None:
            added = factor * _product(module, self.down.to(inputs), self.up, inputs)
        if self.bias is not None:
            added = added + factor * _by_output(self.bias.to(output), output)
        if self.dora is None:
            return added
        own = self.dora.factor((torch.ones_like(rows) if self.dora.fixed else rows).flatten().float() * self.scale)
        own = own.to(output).reshape(-1, *_by_output(own[0], output).shape[1:])
        bias = 0 if module.bias is None else _by_output(module.bias.to(output), output)
        blend = rows if self.dora.fixed else 1
        return torch.where(rows == 0, 0, blend * (own - 1) * (output - bias) + own * added)


def _each(weights: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The rows' weights, shaped for a layer's output. Frames or tokens folded into dimension 0 are several per row."""
    per_row, rest = divmod(output.shape[0], len(weights))
    if rest:
        raise ValueError(f"{output.shape[0]} entries are not a multiple of {len(weights)} rows")
    if per_row > 1 and len(weights) > 1:
        weights = weights.repeat_interleave(per_row)
    return weights.to(output).reshape(-1, *[1] * (output.dim() - 1))


def fitted(module: Any, layer: FileLayer) -> LoraLayer:
    """The layer for a module, on its device and in its dtype; shapes alone (meta tensors) stay there.

    Raises:
        DoesNotFit: its shapes are not the module's, or its parts do not go together.
    """
    parts = dict(layer.others)
    if isinstance(module, _NORMS) or "w_norm" in parts or "b_norm" in parts:
        return _norm_layer(module, parts)
    if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
        raise DoesNotFit(f"it is a {type(module).__name__}")
    weight = module.weight
    down, up, scale = layer.down, layer.up, layer.scale
    if (mid := parts.pop("lora_mid", None)) is not None and down is not None:
        down = torch.einsum("abhw,bi->aihw", mid, down.flatten(1))
    if any(part.startswith(("hada", "lokr")) for part in parts):
        make = _hada if any(part.startswith("hada") for part in parts) else _lokr
        try:
            down, scale = make(parts, layer.alpha)
        except (KeyError, RuntimeError) as error:
            raise DoesNotFit(f"its parts {', '.join(sorted(layer.others))} do not go together") from error
    elif (diff := parts.pop("diff", None)) is not None:
        down, scale = diff, 1.0
    bias = parts.pop("lora_B.bias", None)
    if (diff_bias := parts.pop("diff_b", None)) is not None:
        bias = diff_bias / scale  # stored as it is added
    if (down is None and bias is None) or (bias is not None and bias.numel() != weight.shape[0]):
        raise DoesNotFit("its shapes are others")
    down, up = _shaped(down, up, weight)
    here = torch.device("cpu") if weight.is_meta else weight.device  # an offloaded weight's hook moves these
    made = LoraLayer(
        down=_placed(down, here, weight.dtype),
        up=_placed(up, here, weight.dtype),
        scale=scale,
        bias=_placed(bias, here, weight.dtype),
    )
    magnitude = next((parts.pop(part) for part in ("dora_scale", "lora_magnitude_vector") if part in parts), None)
    if parts:
        raise DoesNotFit(f"{', '.join(sorted(parts))} have no meaning here")
    if magnitude is None:
        return made
    return _with_dora(made, weight, magnitude, fixed="dora_scale" in layer.others)


def _shaped(
    down: torch.Tensor | None, up: torch.Tensor | None, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if down is None:
        return None, None
    try:
        if up is None:
            return down.reshape(weight.shape), None
        rank = down.shape[0]
        kernel = down.shape[2:] or (1,) * (weight.dim() - 2)
        if weight.dim() == _DIMENSION and tuple(kernel) != tuple(weight.shape[2:]):
            raise DoesNotFit("its kernel is another")
        return down.reshape(rank, *weight.shape[1:]), up.reshape(weight.shape[0], rank, *[1] * (weight.dim() - 2))
    except RuntimeError as error:
        raise DoesNotFit("its shapes are others") from error


def _placed(tensor: torch.Tensor | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.is_meta else tensor.to(device, dtype)


def _hada(parts: dict[str, torch.Tensor], alpha: float | None) -> tuple[torch.Tensor, float]:
    """LoHa: the product, value by value, of two products of matrices."""
    halves = []
    for number in "12":
        a, b = parts.pop(f"hada_w{number}_a"), parts.pop(f"hada_w{number}_b")
        halves.append(_tucker(parts.pop(f"hada_t{number}", None), a, b))
        rank = b.shape[0]
    return halves[0] * halves[1], 1.0 if alpha is None else alpha / rank


def _lokr(parts: dict[str, torch.Tensor], alpha: float | None) -> tuple[torch.Tensor, float]:
    """LoKr: the Kronecker product of two matrices, each of which may itself be a product."""
    halves, rank = [], None
    for number in "12":
        whole = parts.pop(f"lokr_w{number}", None)
        if whole is None:
            a, b = parts.pop(f"lokr_w{number}_a"), parts.pop(f"lokr_w{number}_b")
            rank = b.shape[0]
            whole = _tucker(parts.pop("lokr_t2", None) if number == "2" else None, a, b)
        halves.append(whole)
    first, second = halves
    first = first.reshape(*first.shape, *[1] * (second.dim() - 2))
    return torch.kron(first, second.contiguous()), 1.0 if alpha is None or rank is None else alpha / rank


def _tucker(core: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _norm_layer(module: Any, parts: Mapping[str, torch.Tensor]) -> LoraLayer:
    weight, bias = parts.get("w_norm", parts.get("diff")), parts.get("b_norm", parts.get("diff_b"))
    known = {"w_norm", "b_norm", "diff", "diff_b"}
    own = getattr(module, "weight", None)
    if not isinstance(module, _NORMS) or own is None or weight is None or set(parts) - known:
        raise DoesNotFit(f"{', '.join(sorted(parts)) or 'a pair of matrices'} cannot change a {type(module).__name__}")
    if any(change is not None and change.shape != own.shape for change in (weight, bias)):
        raise DoesNotFit("its shapes are others")
    here = torch.device("cpu") if own.is_meta else own.device
    placed = _placed(weight, here, own.dtype)
    assert placed is not None
    return LoraLayer(norm=(placed, _placed(bias, here, own.dtype)))


def _normalized(module: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight, bias = weight.to(inputs), None if bias is None else bias.to(inputs)
    if isinstance(module, torch.nn.GroupNorm):
        return functional.group_norm(inputs, module.num_groups, weight, bias, module.eps)
    return functional.layer_norm(inputs, module.normalized_shape, weight, bias, module.eps)


def _with_dora(layer: LoraLayer, weight: torch.Tensor, magnitude: torch.Tensor, *, fixed: bool) -> LoraLayer:
    """Raises DoesNotFit: the magnitudes are not one for each output, or the weights are not in memory."""
    if magnitude.numel() != weight.shape[0] or (
        magnitude.dim() > 1 and magnitude.shape[0] != weight.shape[0] and fixed
    ):
        raise DoesNotFit("its DoRA magnitudes are not one for each output")
    if layer.down is None or layer.down.is_meta:
        return layer
    if weight.is_meta or type(weight.data) is not torch.Tensor:
        raise DoesNotFit("DoRA needs the model's own weights, so neither --offload sequential nor --quantized")
    base = weight.detach().float().flatten(1)
    down = layer.down.float().flatten(1)
    own = down if layer.up is None else layer.up.float().flatten(1) @ down
    dora = Dora(
        magnitude=magnitude.float().flatten().to(base.device),
        square=base.square().sum(1),
        cross=(base * own).sum(1),
        own_square=own.square().sum(1),
        fixed=fixed,
    )
    return LoraLayer(down=layer.down, up=layer.up, scale=layer.scale, bias=layer.bias, dora=dora)


def _product(module: Any, down: torch.Tensor, up: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    if isinstance(module, torch.nn.Conv2d):
        middle = functional.conv2d(inputs, down, None, module.stride, module.padding, module.dilation)
        return middle if up is None else functional.conv2d(middle, up.to(inputs))
    middle = functional.linear(inputs, down)
    return middle if up is None else functional.linear(middle, up.to(inputs))


def _by_output(values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """(out,) in a shape that multiplies a layer's output: channels are second of an image, last of a sequence."""
    return values.reshape(1, -1, 1, 1) if output.dim() == _DIMENSION else values.reshape(*[1] * (output.dim() - 1), -1)
