"""`CallSignature`: the parameters of a pipeline's `__call__`, for pipeline classes and modular blocks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from calotype_shared.errors import InvalidRequest

# Set by the engine from other fields of a request, or never set.
_OURS = frozenset(
    {
        "prompt", "negative_prompt", "height", "width", "num_inference_steps", "generator", "image", "mask_image",
        "control_image", "strength", "num_frames", "num_images_per_prompt", "num_videos_per_prompt",
        "num_waveforms_per_prompt", "batch_size", "output_type", "return_dict", "latents", "output", "state", "video",
    }
)  # fmt: skip
_REFUSED_ENDS = ("_embeds", "_embeds_mask", "_latents", "_kwargs", "_path", "_image", "_images", "_video", "_mask")
_REFUSED_TYPES = ("Callable", "Tensor", "Generator", "Image", "Path", "ndarray", "dtype")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    name: str
    default: Any  # None if it has none
    required: bool
    annotation: str


@dataclass(frozen=True, kw_only=True)
class CallSignature:
    """The parameters of a pipeline by name."""

    parameters: Mapping[str, Parameter]
    outputs: tuple[str, ...] = ()  # the results that modular blocks state; of a class, its `__call__` returns all

    @property
    def modular(self) -> bool:
        return bool(self.outputs)

    @classmethod
    def of(cls, pipeline: Any) -> Self:
        if hasattr(pipeline, "blocks"):
            return cls._of_blocks(pipeline.blocks)
        empty = inspect.Parameter.empty
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return cls(
            parameters={
                name: Parameter(
                    name=name,
                    default=None if given.default is empty else given.default,
                    required=given.default is empty,
                    annotation=str(given.annotation),
                )
                for name, given in inspect.signature(type(pipeline).__call__).parameters.items()
                if name != "self" and given.kind not in kinds
            }
        )

    @classmethod
    def _of_blocks(cls, blocks: Any) -> Self:
        required = set(blocks.required_inputs)
        found = {}
        for given in blocks.inputs:
            if given.name:
                defaults = [given.default, *(getattr(given, "defaults_by_block", None) or {}).values()]
                found[given.name] = Parameter(
                    name=given.name,
                    default=next((default for default in defaults if default is not None), None),
                    required=bool(given.required) and given.name in required,
                    annotation=str(given.type_hint),
                )
        return cls(parameters=found, outputs=tuple(given.name for given in blocks.outputs))

    def __contains__(self, name: str) -> bool:
        return name in self.parameters

    def default(self, name: str) -> Any:
        """None if there is no such parameter."""
        return self.parameters[name].default if name in self.parameters else None

    def free(self) -> list[str]:
        """The names allowed in a request's `parameters`: those with JSON values that no other field sets."""
        return [name for name, given in self.parameters.items() if name not in _OURS and _free(given)]

    def required(self) -> list[str]:
        """Of a class; those of modular blocks depend on the other inputs."""
        return [name for name, given in self.parameters.items() if given.required and not self.modular]

    def examples(self) -> dict[str, Any]:
        """A value for each free parameter that has no default, such as the labels of classes."""
        needed = set(self.free()) & set(self.required())
        return {name: _example(self.parameters[name]) for name in needed}

    def check(self, model: str, parameters: Mapping[str, Any]) -> None:
        """Refuse parameters that the pipeline does not accept.

        Raises:
            InvalidRequest: a parameter is unknown, has the wrong type or is missing.
        """
        free = self.free()
        for name in self.examples().keys() - parameters.keys():
            raise InvalidRequest(f"model {model!r} needs it", field=f"parameters.{name}", value=None, remedy="give it")
        for name, value in parameters.items():
            if name not in free:
                raise InvalidRequest(
                    f"model {model!r} has no such parameter",
                    field=f"parameters.{name}",
                    value=value,
                    remedy=f"use one of: {', '.join(free) or 'none'}",
                )
            wanted = _types(self.parameters[name])
            if value is not None and wanted and not _is_one_of(value, wanted):
                raise InvalidRequest(
                    "is not of its type",
                    field=f"parameters.{name}",
                    value=value,
                    remedy=f"use {' or '.join(sorted(kind.__name__ for kind in wanted))}",
                )


def _free(given: Parameter) -> bool:
    if given.name.startswith(("callback", "_")) or given.name.endswith(_REFUSED_ENDS):
        return False
    if given.default is not None:
        return isinstance(given.default, bool | int | float | str | list | tuple | dict)
    return not any(word in given.annotation for word in _REFUSED_TYPES)


def _types(given: Parameter) -> set[type]:
    """The Python types that the parameter accepts; empty: unknown."""
    found: set[type] = set()
    for kind in (bool, int, float, str, list, tuple, dict):
        if kind.__name__ in given.annotation.lower().replace("typing.", ""):
            found.add(kind)
    if given.default is not None:
        found.add(type(given.default))
    if found & {int, float}:
        found |= {int, float} if float in found else set()
    return found | ({list} if tuple in found else set())


def _example(given: Parameter) -> Any:
    for kind, value in ((list, [0]), (str, "a"), (int, 1), (float, 1.0), (dict, {})):
        if kind in _types(given):
            return value
    return None


def _is_one_of(value: Any, wanted: set[type]) -> bool:
    if isinstance(value, bool):
        return bool in wanted
    return isinstance(value, tuple(wanted))
