"""`Converter`: LoRA files' pairs of matrices under a model's own names, by diffusers' converters."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.header import named
from calotype_worker.models.parts import reason

Place = tuple[str, str]  # a component and a module's path in it
State = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class FileLayer:
    """One module's change as stored: a pair of matrices, or other parts, or both."""

    down: torch.Tensor | None = None  # (r, in) or (r, in, k, k)
    up: torch.Tensor | None = None  # (out, r) or (out, r, 1, 1)
    scale: float = 1.0  # alpha / r
    alpha: float | None = None
    others: dict[str, torch.Tensor] = field(default_factory=dict)

    def as_shapes(self) -> FileLayer:
        assert self.down is not None
        assert self.up is not None
        return FileLayer(down=self.down.to("meta"), up=self.up.to("meta"))


class Converter:
    """diffusers' converters for one pipeline class, with every key of their result accounted for."""

    def __init__(
        self, what: str, pipeline: Any, components: Mapping[str, torch.nn.Module], metadata: Mapping[str, Any]
    ) -> None:
        self._what = what
        self._pipeline = pipeline
        self._components = components
        self._metadata = metadata

    def __call__(self, state: State) -> dict[Place, FileLayer]:
        unet = self._components.get("unet")
        config = {"unet_config": unet.config} if unet is not None else {"return_alphas": True}
        try:
            found = self._pipeline.lora_state_dict(dict(state), return_lora_metadata=True, **config)
        except Exception as error:
            raise ModelLoadError(
                f"{self._what} cannot be converted by diffusers: {reason(error)}; use one that was trained for this "
                "model"
            ) from error
        converted, alphas = found[0], (found[1] if len(found) == 3 else None) or {}
        prefixed = any(key.startswith(f"{component}.") for key in converted for component in self._components)
        layers: dict[Place, FileLayer] = {}
        unused = set(converted)
        for index, component in enumerate(self._components):
            start = f"{component}." if prefixed else ""
            if not prefixed and index:
                break  # without prefixes everything is the first component's, the denoiser's
            own = {key.removeprefix(start): value for key, value in converted.items() if key.startswith(start)}
            own_alphas = {key.removeprefix(start): value for key, value in alphas.items() if key.startswith(start)}
            unused -= {start + key for key in own}
            if own and not any("lora_A" in key for key in own):
                convert = _text_to_peft if component.startswith("text") else convert_unet_state_dict_to_peft
                own, own_alphas = convert(own), convert(own_alphas)
            self._pair(component, own, own_alphas, layers)
        if unused:
            raise ModelLoadError(
                f"{self._what} changes parts that this model does not have: {named(sorted(unused))}; use one that was "
                "trained for it"
            )
        return layers

    def _pair(self, component: str, own: State, alphas: Mapping[str, Any], layers: dict[Place, FileLayer]) -> None:
        for key, value in own.items():
            own_name = re.sub(r"\.lora_([AB])\.\w+\.weight$", r".lora_\1.weight", key)
            path, end = own_name[: -len(".lora_A.weight")], own_name[-len(".lora_A.weight") :]
            if end not in (".lora_A.weight", ".lora_B.weight"):
                raise ModelLoadError(
                    f"{self._what} holds {component}.{key}, which is not a part of a LoRA; leave it out"
                )
            layer = layers.setdefault((component, path), FileLayer())
            if end == ".lora_B.weight":
                layer.up = value
                continue
            alpha = next((alphas[k] for k in (f"{key}.alpha", f"{path}.alpha") if k in alphas), None)
            layer.down = value
            layer.scale = _scale(component, path, value.shape[0], alpha=alpha, metadata=self._metadata)

    @functools.cached_property
    def _paths(self) -> dict[Place, str]:
        """Each component's module paths, by the same with underscores."""
        found = {}
        for component, root in self._components.items():
            for path, _ in root.named_modules():
                found[component, path.replace(".", "_")] = path
        return found

    def named_alike(self, name: str) -> Place | None:
        """The module whose path with underscores is this name, after kohya's or LyCORIS' prefix."""
        for component in self._components:
            if name.startswith(f"{component}."):
                return component, name.removeprefix(f"{component}.")
            prefixes = ["lycoris_", "lora_unet_", "lora_transformer_"]
            if component.startswith("text_encoder"):
                number = component.removeprefix("text_encoder").removeprefix("_") or "1"
                prefixes = [f"lora_te{number}_", *(["lora_te_"] if number == "1" else [])]
            flat = next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), None)
            if flat is None:
                continue
            path = self._paths.get((component, flat), self._paths.get((component, flat.removeprefix("text_model_"))))
            if path is not None:
                return component, path
        return None


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
