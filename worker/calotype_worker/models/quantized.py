"""Weights in eight bits, by torchao: half the memory of bfloat16, and faster on devices that compute in eight bits."""

from __future__ import annotations

from typing import Any

import torch

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.accelerations import Quantized

_FLOAT8_SINCE = (8, 9)  # CUDA compute capability: Ada and Hopper


def quantize(network: torch.nn.Module, kind: Quantized, *, device: torch.device, offload: str, name: str) -> None:
    """Quantize the layers of a network that process whole sequences: attention and feed-forward.

    Other layers have few weights and rows: timestep embeddings, modulations, convolutions (unsupported by torchao).
    "int8" keeps computing in the model's dtype; "int8-dynamic" and "float8" round the layers' inputs too.

    Raises:
        ModelLoadError: torchao is missing, or the device does not support it.
    """
    if kind == "float8" and not _has_float8(device):
        raise ModelLoadError(
            f"model {name!r}: quantized=float8 on device {str(device)!r} needs an NVIDIA GPU of compute capability "
            "8.9 or newer (Ada, Hopper); use such a GPU, or quantized=int8"
        )
    if offload == "sequential":
        raise ModelLoadError(
            f"model {name!r}: quantized={kind} cannot be combined with offload=sequential; use offload=model or none"
        )
    try:
        from torchao import quantization  # noqa: PLC0415 - an optional extra, and seconds to import
    except ImportError as error:
        raise ModelLoadError(
            f"model {name!r}: quantized={kind} needs torchao, which is not installed ({error}); run: "
            "pip install 'calotype[quantized]'"
        ) from error
    config = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8-dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "float8": quantization.Float8DynamicActivationFloat8WeightConfig,
    }[kind]()
    quantization.quantize_(network, config, filter_fn=_sees_sequences)


def _has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FLOAT8_SINCE


def _sees_sequences(module: torch.nn.Module, path: str) -> bool:
    """Eight-bit kernels require multiples of 16 features, and more than a few rows."""
    return (
        isinstance(module, torch.nn.Linear)
        and "transformer_blocks." in path
        and ".norm" not in path
        and module.in_features % 16 == 0
        and module.out_features % 16 == 0
    )


def weight_bytes(module: torch.nn.Module) -> int:
    """Memory of a module's weights, quantized ones as they are kept."""
    return sum(_bytes(parameter) for parameter in module.parameters())


def _bytes(tensor: Any) -> int:
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        return int(tensor.numel() * tensor.element_size())
    return sum(_bytes(part) for part in (getattr(tensor, name) for name in parts()[0]) if part is not None)
