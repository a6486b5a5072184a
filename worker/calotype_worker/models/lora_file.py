"""LoRA files in every spelling that diffusers reads: which layers they change, with every key used or refused.

diffusers' converters know the names of kohya, peft, xlabs and others, but drop what is not a plain pair of matrices.
So they are given the plain pairs alone, once more with a number in each pair instead of its values, which shows where
it went. The other keys of a module (DoRA, LoHa, LoKr, …) follow its number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.header import Header, named, read_header
from calotype_worker.models.lora_convert import Converter, FileLayer, Place, State
from calotype_worker.models.single_file import SUFFIXES

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
    convert = Converter(what, pipeline, components, metadata)
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


def is_lora(header: Header) -> bool:
    """Whether half of a file's tensors are LoRA, LoHa or LoKr matrices. A checkpoint may hold some among its own."""
    found = [key for key in header.tensors if _PLAIN.match(key) or re.search(r"\.(hada|lokr)_\w+$", key)]
    return bool(found) and 2 * len(found) >= len(header.tensors)


def check_tensors(what: str, header: Header) -> None:
    """Check that each tensor of a LoRA file has a meaning; `what` begins the message.

    Raises:
        ModelLoadError: a tensor has no known meaning, or its other half is missing.
    """
    _modules(what, header)


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


def _places(what: str, header: Header, modules: Mapping[str, Module], convert: Converter) -> dict[str, Place]:
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
