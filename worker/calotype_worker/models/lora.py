"""LoRAs (Hu et al. 2021), with a separate selection for every row of one forward pass.

A forward hook on each adapted layer adds `weight · scale · up(down(x))` to its output, with `weight` each row's own;
rows without that LoRA have weight 0. Because all rows are processed, a row's bits do not depend on the LoRAs of others,
and the two small products are cheap compared with the layer's. peft's mixed batches allow one adapter per row, at one
fixed weight.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open

from calotype_shared.errors import InvalidRequest, ModelLoadError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    down: torch.Tensor  # (r, in) or (r, in, k, k)
    up: torch.Tensor  # (out, r) or (out, r, 1, 1)
    scale: float  # alpha / r
    bias: torch.Tensor | None = None  # (out,), of `up`


@dataclass(frozen=True, kw_only=True)
class Lora:
    """`layers` by component and module path: ("unet", "mid_block.attentions.0.….to_q")."""

    name: str
    layers: Mapping[tuple[str, str], LoraLayer]

    def touches(self, component: str) -> bool:
        return component in self.patterns

    @functools.cached_property
    def patterns(self) -> Mapping[str, int]:
        """By component: a number that is equal for LoRAs that change the same layers."""
        paths: dict[str, set[str]] = {}
        for component, path in self.layers:
            paths.setdefault(component, set()).add(path)
        return {component: hash(frozenset(found)) for component, found in paths.items()}


class LoraBank:
    """A model's LoRAs: registered by name, loaded on first use, the least recently used evicted. Thread-safe."""

    def __init__(
        self, pipeline: Any, components: Mapping[str, torch.nn.Module], files: Mapping[str, Path], *, capacity: int
    ) -> None:
        """`components` are the adapted modules by the names that LoRA files use: unet, transformer, text_encoder."""
        self._pipeline = pipeline
        self._components = dict(components)
        self._files = dict(files)
        self._capacity = capacity
        self._loaded: OrderedDict[str, Lora] = OrderedDict()
        self._hooked: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._active: Sequence[tuple[Lora, torch.Tensor]] = ()  # the engine's thread

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._files))

    def check_files(self) -> None:
        """Load each file once, so that later no layer gets its hook while the network runs.

        Raises:
            ModelLoadError: a file is broken or for another model.
        """
        for name in self.names:
            self.get(name)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The LoRAs in memory, the next to be evicted first."""
        with self._lock:
            return tuple(self._loaded)

    def get(self, name: str) -> Lora:
        """Get the LoRA from memory or its file.

        Raises:
            InvalidRequest: it is not registered for this model.
            ModelLoadError: its file is broken or for another model.
        """
        if name not in self._files:
            raise InvalidRequest(
                "is not a registered LoRA",
                field="loras",
                value=name,
                remedy=f"use one of: {', '.join(self.names) or 'none registered'}; or start the worker with "
                f"--lora {name}=FILE",
            )
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
                log.info("LoRA loaded", extra={"lora": name})
            self._loaded.move_to_end(name)
            while len(self._loaded) > self._capacity:
                evicted, _ = self._loaded.popitem(last=False)
                log.info("LoRA evicted", extra={"lora": evicted})
            return self._loaded[name]

    @contextmanager
    def active(self, chosen: Sequence[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """Within the block every adapted layer applies these: name, and each row's weight (R,) or one for all (1,).

        The engine's thread.
        """
        before = self._active  # nested: a part of the rows may run a part of the network
        self._active = [(self.get(name), weights) for name, weights in sorted(chosen, key=lambda pair: pair[0])]
        try:
            yield
        finally:
            self._active = before

    def _load(self, name: str) -> Lora:
        path = self._files[name]
        try:
            layers = _read_layers(self._pipeline, path, self._components)
        except ModelLoadError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelLoadError(
                f"LoRA {name!r}: {path.name!r} could not be read: {reason}; give a safetensors file"
            ) from error
        adapted = {}
        for (component, written_path), layer in layers.items():
            found = _find(self._components[component], written_path)
            if found is None or not _fits(found[1], layer):
                raise ModelLoadError(
                    f"LoRA {name!r}: layer {component}.{written_path} does not fit this model; "
                    "use one that was trained for it"
                )
            module_path, module = found
            weight = cast("torch.Tensor", module.weight)
            # With sequential offload, weights have no device; the hook then moves these to its inputs' device.
            device = torch.device("cpu") if weight.is_meta else weight.device
            adapted[component, module_path] = LoraLayer(
                down=layer.down.to(device, weight.dtype),
                up=layer.up.to(device, weight.dtype),
                scale=layer.scale,
                bias=None if layer.bias is None else layer.bias.to(device, weight.dtype),
            )
            if (component, module_path) not in self._hooked:
                self._hooked.add((component, module_path))
                module.register_forward_hook(self._hook((component, module_path)), with_kwargs=True)
        return Lora(name=name, layers=adapted)

    def _hook(self, key: tuple[str, str]) -> Any:
        def add(
            module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: torch.Tensor
        ) -> torch.Tensor:
            for lora, weights in self._active:
                layer = lora.layers.get(key)
                if layer is not None:
                    change = _change(module, layer, args[0] if args else kwargs["input"])
                    output = output + _each(weights * layer.scale, change) * change
            return output

        return add


def _each(weights: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The rows' weights, shaped for a layer's output. Frames or tokens folded into dimension 0 are several per row."""
    per_row, rest = divmod(change.shape[0], len(weights))
    if rest:
        raise ValueError(f"{change.shape[0]} entries are not a multiple of {len(weights)} rows")
    if per_row > 1 and len(weights) > 1:
        weights = weights.repeat_interleave(per_row)
    return weights.to(change).reshape(-1, *[1] * (change.dim() - 1))


def _change(module: torch.nn.Module, layer: LoraLayer, inputs: torch.Tensor) -> torch.Tensor:
    down, up = layer.down.to(inputs), layer.up.to(inputs)  # no copy if they already match
    bias = None if layer.bias is None else layer.bias.to(inputs)
    if isinstance(module, torch.nn.Conv2d):
        middle = torch.nn.functional.conv2d(inputs, down, None, module.stride, module.padding, module.dilation)
        return torch.nn.functional.conv2d(middle, up, bias)
    return torch.nn.functional.linear(torch.nn.functional.linear(inputs, down), up, bias)


def _read_layers(
    pipeline: Any, path: Path, components: Mapping[str, torch.nn.Module]
) -> dict[tuple[str, str], LoraLayer]:
    """A LoRA file in any spelling that diffusers reads (its own, peft's, kohya's), layer by layer.

    Raises:
        ModelLoadError: nothing in it is for this model, or something would not be used.
    """
    if path.suffix != ".safetensors":
        raise ModelLoadError(
            f"LoRA {path.name!r} is not a .safetensors file, and pickle files are never opened; convert it with "
            "safetensors.torch.save_file"
        )
    unet = components.get("unet")
    config = {"unet_config": unet.config} if unet is not None else {"return_alphas": True}
    found = pipeline.lora_state_dict(str(path), use_safetensors=True, return_lora_metadata=True, **config)
    state, metadata = found[0], found[-1] or {}
    alphas = (found[1] if len(found) == 3 else None) or {}
    prefixed = any(key.startswith(f"{component}.") for key in state for component in components)
    layers: dict[tuple[str, str], LoraLayer] = {}
    unused = [key for key in _keys(path) if key.endswith("dora_scale")]  # diffusers would drop them
    if prefixed:
        unused += [key for key in state if not key.startswith(tuple(f"{component}." for component in components))]
    for index, component in enumerate(components):
        start = f"{component}." if prefixed else ""
        if not prefixed and index:
            break  # without prefixes everything is the first component's, the denoiser's
        own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        own_alphas = {key.removeprefix(start): value for key, value in alphas.items() if key.startswith(start)}
        if own and not any("lora_A" in key for key in own):
            convert = _text_to_peft if component.startswith("text") else convert_unet_state_dict_to_peft
            own, own_alphas = convert(own), convert(own_alphas)
        used = set()
        for key, down in own.items():
            if not key.endswith(".lora_A.weight"):
                continue
            module_path = key.removesuffix(".lora_A.weight")
            used |= {key, f"{module_path}.lora_B.weight", f"{module_path}.lora_B.bias"}
            alpha = next((own_alphas[k] for k in (f"{key}.alpha", f"{module_path}.alpha") if k in own_alphas), None)
            layers[component, module_path] = LoraLayer(
                down=down,
                up=own[f"{module_path}.lora_B.weight"],
                scale=_scale(component, module_path, down.shape[0], alpha=alpha, metadata=metadata),
                bias=own.get(f"{module_path}.lora_B.bias"),
            )
        unused += [f"{start}{key}" for key in own if key not in used]
    if unused:
        raise ModelLoadError(
            f"LoRA {path.name!r}: {len(unused)} of its entries would not be used: {', '.join(sorted(unused)[:4])}"
            f"{' …' if len(unused) > 4 else ''}; use a plain LoRA (no DoRA or LoKr) that was trained for this model"
        )
    if not layers:
        raise ModelLoadError(f"LoRA {path.name!r} has no LoRA layers for this model; use one that was trained for it")
    return layers


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _text_to_peft(state: Mapping[str, Any]) -> dict[str, Any]:
    """Old names of a text encoder's LoRA layers: q_proj is `to_q_lora.down` or `q_proj.lora_linear_layer.down`."""
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"\.to_([qkv])_lora\.", r".\1_proj.lora.", key).replace(".to_out_lora.", ".out_proj.lora.")
        name = re.sub(r"\.lora(_linear_layer)?\.down\.", ".lora_A.", name)
        renamed[re.sub(r"\.lora(_linear_layer)?\.up\.", ".lora_B.", name)] = value
    return renamed


def _scale(component: str, module_path: str, rank: int, *, alpha: float | None, metadata: Mapping[str, Any]) -> float:
    """alpha / r. Alpha is stored with the layer or in the file's metadata, or equals the rank."""
    if alpha is not None:
        return float(alpha) / rank
    own = {
        key.removeprefix(f"{component}."): value for key, value in metadata.items() if key.startswith(f"{component}.")
    }
    shared_alpha = own.get("lora_alpha", rank)
    for pattern, value in (own.get("alpha_pattern") or {}).items():
        if module_path.endswith(pattern):
            shared_alpha = value
    return float(shared_alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _find(root: torch.nn.Module, path: str) -> tuple[str, torch.nn.Module] | None:
    """The module and its path: transformers 5 has removed the prefix `text_model.` that files still contain."""
    for candidate in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        try:
            return candidate, root.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def _fits(module: torch.nn.Module, layer: LoraLayer) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and weight is not None
        and layer.down.shape[1] == weight.shape[1]
        and layer.up.shape[0] == weight.shape[0]
        and layer.up.shape[1] == layer.down.shape[0]
    )
