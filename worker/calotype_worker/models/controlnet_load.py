"""Loads ControlNets: diffusers folders, hub ids and single safetensors files, each checked against its U-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file

from calotype_shared.errors import ModelLoadError
from calotype_worker.models import hub
from calotype_worker.models.folder import names_in, read_config, weights_of
from calotype_worker.models.header import Header, named, read_header, refuse_quantized
from calotype_worker.models.parts import load_whole, reason
from calotype_worker.models.single_file import SUFFIXES

# What a ControlNet must share with its U-Net: its residuals have these shapes, and it reads the same inputs.
_SHARED = {
    "in_channels": "latent channels",
    "block_out_channels": "channels per block",
    "layers_per_block": "layers per block",
    "cross_attention_dim": "text embeddings of width",
    "addition_embed_type": "added conditioning",
    "projection_class_embeddings_input_dim": "added conditioning of width",
}
_LDM = ("control_model.", "input_hint_block.", "input_blocks.")
_OTHER_KINDS = {  # a key of single files that are no plain ControlNet
    "task_embedding": "a ControlNetUnion",
    "control_add_embedding.linear_1.weight": "a ControlNetUnion",
    "lllite_": "a ControlNet-LLLite",
    "adapter.body.": "a T2I-Adapter",
    "ip_adapter.": "an IP-Adapter",
    "double_blocks.": "a ControlNet for Flux",
    "controlnet_x_embedder.weight": "a ControlNet for Flux",
}


def load_controlnets(sources: Mapping[str, str], *, dtype: torch.dtype, unet: Any, channels: int) -> dict[str, Any]:
    """ControlNets by name, on the CPU in `dtype`; `channels` are those of the latents.

    Raises:
        ModelLoadError: one cannot be loaded whole, is of another kind, or is for another kind of U-Net.
    """
    nets = {}
    for name, source in sources.items():
        what = f"ControlNet {name!r}"
        path = Path(source).expanduser()
        if path.suffix.lower() in SUFFIXES and not path.is_dir():
            net = _from_file(what, path, FrozenDict({**unet.config, "in_channels": channels}), dtype)
        else:
            net = from_folder(what, name, source, dtype, kinds=["ControlNetModel"])
            _check_shared(what, net.config, {**unet.config, "in_channels": channels})
        if getattr(net.config, "global_pool_conditions", False):
            raise ModelLoadError(
                f"{what} pools its residuals (global_pool_conditions) and runs for the prompt's row alone, which is "
                "not supported; use another one"
            )
        nets[name] = net.eval()
    return nets


def from_folder(what: str, name: str, source: str, dtype: torch.dtype, *, kinds: Sequence[str]) -> Any:
    """A ControlNet of one of these classes of diffusers, from a folder or hub id.

    Raises:
        ModelLoadError: it cannot be loaded whole, or is of another class.
    """
    import diffusers  # noqa: PLC0415 - takes seconds

    path = Path(source).expanduser()
    folder, snapshot = path, None
    if not path.is_dir():
        repository = None if path.is_absolute() or source.startswith((".", "~")) else hub.parse_id(source)
        if repository is None:
            raise ModelLoadError(f"{what}: {source!r} does not exist; check the path after '='")
        snapshot = hub.find(name, repository)
        folder = snapshot.folder
    kind = str(read_config(what, folder / "config.json").get("_class_name"))
    if kind not in kinds:
        raise ModelLoadError(
            f"{what}: {source!r} is a {kind}, which is not supported; use a {' or '.join(kinds)} for this model"
        )
    own = [file for file in (snapshot.names if snapshot else names_in(folder)) if "/" not in file]
    variant, files = weights_of(what, folder, "", own, wanted=None)
    if snapshot:
        snapshot.download(name, files)
    return load_whole(what, getattr(diffusers, kind), folder, files, variant=variant, dtype=dtype)


def _check_shared(what: str, config: Any, unet: Mapping[str, Any]) -> None:
    for key, words in _SHARED.items():
        own, wanted = config.get(key), unet.get(key)
        if isinstance(own, list | tuple):
            own = tuple(own)
        if isinstance(wanted, list | tuple):
            wanted = tuple(wanted)
        if own != wanted:
            raise ModelLoadError(
                f"{what} has or expects {words} {own}, the model has {wanted} ({key}); use one that was trained for "
                "this model"
            )


def _from_file(what: str, file: Path, unet: FrozenDict, dtype: torch.dtype) -> Any:
    """A single file has no config: it is that of a ControlNet made from this U-Net, or the file does not fit."""
    from diffusers import ControlNetModel  # noqa: PLC0415
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint  # noqa: PLC0415

    header = read_header(what, file)
    refuse_quantized(what, file, header)
    for mark, kind in _OTHER_KINDS.items():
        if any(key.startswith(mark) for key in header.tensors):
            raise ModelLoadError(f"{what}: {file.name!r} is {kind}, which is not supported; use a plain ControlNet")
    state = load_file(file)
    with torch.device("meta"):
        net = ControlNetModel.from_unet(
            SimpleNamespace(config=unet),
            load_weights_from_unet=False,
            conditioning_embedding_out_channels=_hint_channels(header),
        )
    if any(key.startswith(_LDM) for key in state):
        try:
            converted = convert_controlnet_checkpoint(state, dict(net.config))
            state = {key: value for key, value in converted.items() if value is not None}
        except Exception as error:
            raise ModelLoadError(
                f"{what}: {file.name!r} is not a ControlNet for this model ({type(error).__name__}: {reason(error)}); "
                "use one that was trained for it"
            ) from error
    wanted = net.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = sorted(key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape)
    for problem, keys in (
        ("lacks", missing),
        ("holds more than its layers:", unexpected),
        ("has other shapes:", shapes),
    ):
        if keys:
            raise ModelLoadError(
                f"{what}: {file.name!r} is not a ControlNet for this model: it {problem} {named(keys)}; use one that "
                "was trained for it"
            )
    net.load_state_dict(state, assign=True)
    return net.to(dtype)


def _hint_channels(header: Header) -> tuple[int, ...]:
    """The widths of the layers that read the control image."""
    found = {}
    for key, own in header.tensors.items():
        name = key.removeprefix("control_model.")
        if name in {"controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight"}:
            found[-1] = own.shape[0]
        elif name.startswith("controlnet_cond_embedding.blocks.") and name.endswith(".weight"):
            number = int(name.split(".")[2])
            if number % 2:
                found[number] = own.shape[0]
        elif name.startswith("input_hint_block.") and name.endswith(".weight"):
            number = int(name.split(".")[1])
            if number in (4, 8, 12):  # those that halve the image
                found[number] = own.shape[0]
    return tuple(found[number] for number in sorted(found)) or (16, 32, 96, 256)
