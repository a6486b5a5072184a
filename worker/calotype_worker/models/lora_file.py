"""LoRA files in every spelling that diffusers reads: which layers they change, with every key used or refused.

diffusers' converters know the names of kohya, peft, xlabs and others, but drop what is not a plain pair of matrices.
So they are given the plain pairs alone, once more with a number in each pair instead of its values, which shows where
it went. The other keys of a module (DoRA, LoHa, LoKr, …) follow its number.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.header import Header, named, read_header
from calotype_worker.models.single_file import SUFFIXES

Place = tuple[str, str]  # a component and a module's path in it
State = dict[str, torch.Tensor]

_PLAIN = re.compile(
    r"^(?P<module>.+?)(?P<end>[._]lora\d*[._](?:linear_layer\.)?(?P<part>A|B|down|up)(?:\.\w+)?\.weight)$"
)
_ALPHA = re.compile(r"^(?P<module>.+?)\.(?:lora_[AB]\.)?alpha$")
# Other tensors of a module, by the end of their names. What is in none of these has no meaning here.
_OTHER = re.compile(
    r"^(?P<module>.+?)\.(?P<part>dora_scale|lora_magnitude_vector|lora_mid|hada_w[12]_[ab]|hada_t[12]|lokr_w[12]"
    r"|lokr_w[12]_[ab]|lokr_t2|diff|diff_b|w_norm|b_norm|(?:lora_B|lora_up)\.bias)(?:\.weight)?$"
)
_METADATA = "lora_adapter_metadata"  # diffusers' own key in a file's header


@dataclass(kw_only=True)
class Module:
    """The tensors of a file that belong to one module, under its name in the file."""

    down: str = ""  # a key
    up: str = ""
    alpha: str = ""
    others: dict[str, str] = field(default_factory=dict)  # part -> key

    @property
    def keys(self) -> list[str]:
        return [key for key in (self.down, self.up, *self.others.values()) if key]


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


def read_layers(
    name: str, pipeline: Any, path: Path, components: Mapping[str, torch.nn.Module], *, values: bool = True
) -> dict[Place, FileLayer]:
    """The layers of a file by component and module path.

    Without `values` only the header is read, and the tensors have their shapes alone.

    Raises:
        ModelLoadError: it is not a safetensors LoRA for these components, or not all of its keys can be used.
    """
    what = f"LoRA {name!r}: {path.name!r}"
    if path.suffix.lower() not in SUFFIXES:
        raise ModelLoadError(
            f"{what} is not a .safetensors file, and pickle files are never opened; convert it with "
            "safetensors.torch.save_file"
        )
    header = read_header(f"LoRA {name!r}", path)
    modules = _modules(what, header)
    metadata = _metadata(what, header)
    convert = _Converter(what, pipeline, components, metadata)
    places = _places(what, header, modules, convert)
    tensors = load_file(path) if values else _shapes(path, header)
    pairs = {own: module for own, module in modules.items() if module.down}
    if not pairs:
        layers: dict[Place, FileLayer] = {}
    elif values:
        layers = convert({key: tensors[key] for m in pairs.values() for key in (m.down, m.up, m.alpha) if key})
    else:  # converters multiply by alpha, which shapes alone do not allow
        layers = {place: layer.as_shapes() for place, layer in convert(_numbered(header, pairs)).items()}
    for own, module in modules.items():
        if module.others:
            layer = layers.setdefault(places[own], FileLayer())
            layer.others = {part: tensors[key] for part, key in module.others.items()}
            layer.alpha = float(tensors[module.alpha]) if module.alpha else None
    if not layers:
        raise ModelLoadError(f"{what} has no LoRA layers for this model; use one that was trained for it")
    return layers


def _modules(what: str, header: Header) -> dict[str, Module]:
    """The file's tensors by module. Raises ModelLoadError if a tensor has no known meaning."""
    modules: dict[str, Module] = {}
    unknown = []
    for key in header.tensors:
        if found := _PLAIN.match(key):
            # The end tells xlabs' two pairs of one module apart.
            module = modules.setdefault(found["module"] + _numbers(found["end"]), Module())
            if found["part"] in ("A", "down"):
                module.down = key
            else:
                module.up = key
        elif found := _ALPHA.match(key):
            modules.setdefault(found["module"], Module()).alpha = key
        elif found := _OTHER.match(key):
            modules.setdefault(found["module"], Module()).others[found["part"].replace("lora_up.", "lora_B.")] = key
        else:
            unknown.append(key)
    halves = [key for m in modules.values() if bool(m.down) != bool(m.up) for key in (m.down, m.up) if key]
    alone = [m.alpha for m in modules.values() if m.alpha and not m.keys]
    if unknown := [*unknown, *halves, *alone]:
        raise ModelLoadError(
            f"{what} holds tensors that are no part of a LoRA, LoCon, DoRA, LoHa or LoKr, or whose other half is "
            f"missing: {named(unknown)}; use a file of these kinds, or merge it into the model"
        )
    return modules


def _metadata(what: str, header: Header) -> dict[str, Any]:
    """diffusers' own settings of the LoRA: ranks, alphas."""
    try:
        found = json.loads(header.metadata.get(_METADATA, "{}"))
        return dict(found)
    except (ValueError, TypeError) as error:
        raise ModelLoadError(
            f"{what}: {_METADATA!r} in its header is not a JSON object; save the file again"
        ) from error


def _numbers(end: str) -> str:
    return "".join(char for char in end if char.isdigit())


def _places(what: str, header: Header, modules: Mapping[str, Module], convert: _Converter) -> dict[str, Place]:
    """Where each module with other parts went. Raises ModelLoadError if a module went nowhere, or not as a whole."""
    whole = {name: place for name, m in modules.items() if not m.down and (place := convert.named_alike(name))}
    rest = {name: module for name, module in modules.items() if name not in whole}
    found = convert(_numbered(header, rest)) if rest else {}
    went: dict[int, list[Place]] = {}
    for place, layer in found.items():
        assert layer.up is not None
        for number in {round(value) for value in layer.up.float().flatten(1)[:, 0].tolist()}:
            went.setdefault(number, []).append(place)
    lost = [key for number, m in enumerate(rest.values(), 1) if number not in went for key in m.keys]
    if lost:
        raise ModelLoadError(
            f"{what} has layers that this model does not: {named(lost)}; use one that was trained for it"
        )
    places = {name: went[number][0] for number, name in enumerate(rest, 1)}
    split = [
        key
        for number, m in enumerate(rest.values(), 1)
        if m.others and len(went[number]) > 1
        for key in m.others.values()
    ]
    if split:
        raise ModelLoadError(
            f"{what} changes layers that diffusers splits, by more than a pair of matrices: {named(split)}; convert it "
            "to a plain LoRA"
        )
    return places | whole


def _numbered(header: Header, modules: Mapping[str, Module]) -> State:
    """Pairs of matrices with each module's number as values, which take no memory. Their scale is 1."""
    state: State = {}
    for number, (name, module) in enumerate(modules.items(), 1):
        end = ("lora_A.weight", "lora_B.weight") if "." in name else ("lora_down.weight", "lora_up.weight")
        down, up = module.down or f"{name}.{end[0]}", module.up or f"{name}.{end[1]}"
        shapes = [header.tensors[key].shape if key in header.tensors else (1, 1) for key in (down, up)]
        state[down] = torch.tensor(1.0).expand(shapes[0])
        state[up] = torch.tensor(float(number)).expand(shapes[1])
        if module.alpha or not module.down:
            state[module.alpha or f"{name}.alpha"] = torch.tensor(float(shapes[0][0]))
    return state


def _shapes(path: Path, header: Header) -> State:
    """Tensors without values; single numbers have theirs."""
    from safetensors import safe_open  # noqa: PLC0415

    with safe_open(path, framework="pt") as opened:
        return {
            key: opened.get_tensor(key) if own.values == 1 else torch.empty(own.shape, device="meta")
            for key, own in header.tensors.items()
        }


class _Converter:
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
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelLoadError(
                f"{self._what} cannot be converted by diffusers: {reason}; use one that was trained for this model"
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
