"""Writes a tiny diffusers model under the key names of the original (CompVis) code, as community checkpoints have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def write_ldm_checkpoint(pipeline: Any, file: Path) -> Path:
    """All weights of a Stable Diffusion pipeline in one file."""
    state: dict[str, torch.Tensor] = {}
    for key, value in pipeline.unet.state_dict().items():
        state[f"model.diffusion_model.{_unet_key(key, pipeline.unet.config.layers_per_block)}"] = value
    blocks = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        state[f"first_stage_model.{_vae_key(key, blocks)}"] = value
    for key, value in pipeline.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    save_file({key: value.clone().contiguous() for key, value in state.items()}, file)
    return file


def _unet_key(key: str, layers: int) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        kind, index, rest = found.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_resnet(rest)}"
    if found := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", key):
        way, block, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        per_block = layers + 1
        if way == "down":
            if kind == "downsamplers":
                return f"input_blocks.{(block + 1) * per_block}.0.{rest.replace('conv', 'op')}"
            place = 1 + block * per_block + index
            return f"input_blocks.{place}.{int(kind == 'attentions')}.{_resnet(rest)}"
        if kind == "upsamplers":
            return f"output_blocks.{block * per_block + layers}.{2 if block == 0 else 1}.{rest}"
        return f"output_blocks.{block * per_block + index}.{int(kind == 'attentions')}.{_resnet(rest)}"
    raise KeyError(key)


def _resnet(rest: str) -> str:
    name, dot, kind = rest.partition(".")
    return f"{_RESNET.get(name, name)}{dot}{kind}"


def _vae_key(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)


def ldm_controlnet_key(key: str) -> str:
    """A key of a tiny ControlNet as the original code names it, below `control_model.`."""
    if found := re.match(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d))\.(.+)", key):
        place = {"conv_in": 0, "conv_out": 14}.get(found[1], 2 * (int(found[2] or 0) + 1))
        return f"input_hint_block.{place}.{found[3]}"
    if found := re.match(r"controlnet_down_blocks\.(\d+)\.(.+)", key):
        return f"zero_convs.{found[1]}.0.{found[2]}"
    if key.startswith("controlnet_mid_block."):
        return key.replace("controlnet_mid_block", "middle_block_out.0")
    return _unet_key(key, 1)
