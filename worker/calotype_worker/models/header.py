"""Headers of safetensors files: names, types and shapes of all tensors, without reading a weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calotype_shared.errors import ModelLoadError

_AT_MOST = 100 * 2**20  # bytes, the format's own limit
_WEIGHTS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # a cast gives their values
# Tensors that another tensor's values must be multiplied by: ComfyUI's scaled fp8, bitsandbytes, GPTQ, Nunchaku.
_SCALES = (
    "scale_weight", "scale_input", "scaled_fp8", "weight_scale", "weight_scale_2", "input_scale", "comfy_quant",
    "absmax", "quant_map", "SCB", "qweight", "qzeros", "scales", "wscales", "wzeros", "smooth_factor",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a file."""

    dtype: str  # as safetensors writes it: F16, BF16, F8_E4M3, …
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count


@dataclass(frozen=True, kw_only=True)
class Header:
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


def read_header(what: str, file: Path) -> Header:
    """The header of a file; `what` begins the messages, such as "model 'xl'".

    Raises:
        ModelLoadError: there is no such file, it is not safetensors, or it is truncated.
    """
    if not file.is_file():
        raise ModelLoadError(f"{what}: file {str(file)!r} does not exist; check the path after '='")
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = opened.read(length) if length <= _AT_MOST else b""
            size = file.stat().st_size
    except OSError as error:
        raise ModelLoadError(f"{what}: {str(file)!r} cannot be read: {error}; check its permissions") from error
    try:
        found = json.loads(text)
        metadata = found.pop("__metadata__", None) or {}
        tensors = {
            key: Stored(dtype=str(tensor["dtype"]), shape=tuple(int(side) for side in tensor["shape"]))
            for key, tensor in found.items()
        }
        ends = 8 + length + max((tensor["data_offsets"][1] for tensor in found.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelLoadError(
            f"{what}: '{file.parent.name}/{file.name}' is not a safetensors file; download it again, or convert it"
        ) from error
    if size < ends:
        raise ModelLoadError(
            f"{what}: '{file.parent.name}/{file.name}' is truncated at {size} of {ends} bytes; download it again"
        )
    return Header(tensors=tensors, metadata=metadata)


def refuse_quantized(what: str, file: Path, header: Header) -> None:
    """Refuse weights whose values are not those that are stored, but those times scales elsewhere in the file.

    Raises:
        ModelLoadError: names some of these tensors.
    """
    marked = [key for key in header.tensors if key.rpartition(".")[2] in _SCALES or ".quant_state." in key]
    packed = [key for key, own in header.tensors.items() if len(own.shape) > 1 and own.dtype not in _WEIGHTS]
    packed = [key for key in packed if not key.endswith("position_ids")]
    if found := (marked or packed):
        raise ModelLoadError(
            f"{what}: '{file.parent.name}/{file.name}' holds quantized weights ({named(found)}), whose scales would be "
            "ignored; use the file in bfloat16, float16 or plain float8, with --quantized float8 to save memory"
        )


def named(keys: list[str], most: int = 3) -> str:
    """Some of the keys, for a message."""
    shown = ", ".join(sorted(keys)[:most])
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
