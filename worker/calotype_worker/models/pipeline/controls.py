"""ControlNets registered for a pipeline class that has one: loaded at start, and each job's own choice among them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from PIL import Image

from calotype_shared.errors import InvalidRequest, ModelLoadError
from calotype_worker.models.controlnet_load import from_folder
from calotype_worker.models.pipeline.roles import Roles
from calotype_worker.models.pipeline.signature import CallSignature
from calotype_worker.request import GenerationRequest

PART = "controlnet"  # the component's name in all classes
_KINDS = re.compile(r"\b(?!\w*Multi)\w*ControlNet\w*Model\b")  # classes in an annotation, without lists of them
_ALL = "controls"  # an attribute that pipelines get: the registered ones by name


def load_controls(
    model: str, class_name: str, sources: Mapping[str, str], *, dtype: torch.dtype, has_own: bool
) -> dict[str, torch.nn.Module]:
    """The ControlNets by name, from diffusers folders or hub ids with safetensors weights.

    `has_own`: the model's folder contains one.

    Raises:
        ModelLoadError: one cannot be loaded whole or is of another class, or the pipeline takes none, or lacks one.
    """
    import diffusers  # noqa: PLC0415 - takes seconds

    parameter = inspect.signature(getattr(diffusers, class_name).__init__).parameters.get(PART)
    if parameter is None and sources:
        raise ModelLoadError(
            f"model {model!r}: {class_name} takes no ControlNets; leave out --control, or give a class that does, as "
            f"--model {model}=CLASS:FOLDER"
        )
    if parameter is not None and parameter.default is inspect.Parameter.empty and not sources and not has_own:
        raise ModelLoadError(
            f"model {model!r}: {class_name} needs a ControlNet, and the model's folder has none; add "
            f"--control {model}/NAME=FOLDER"
        )
    kinds = sorted(set(_KINDS.findall(str(parameter))))
    found = {
        name: from_folder(f"ControlNet {name!r}", name, source, dtype, kinds=kinds) for name, source in sources.items()
    }
    if len({type(net) for net in found.values()}) > 1:
        raise ModelLoadError(
            f"ControlNets {', '.join(map(repr, found))} are of different classes; register each class for a model of "
            "its own"
        )
    return found


def attach(pipeline: Any, nets: Mapping[str, torch.nn.Module]) -> None:
    """Make them parts of the pipeline, of which each request gets stand-ins."""
    if nets:
        pipeline.__dict__[_ALL] = dict(nets)  # not by setattr, which a pipeline answers by rewriting its config


def names_of(pipeline: Any) -> tuple[str, ...]:
    """The names of the registered ControlNets."""
    return tuple(sorted(getattr(pipeline, _ALL, {})))


def share_roles(roles: Roles, labels: Iterable[str]) -> None:
    """What the probe has shown for the first ControlNet holds for the others, which are of the same class."""
    for (component, method), known in list(roles.known.items()):
        if component == PART:
            roles.known |= {(label, method): known for label in labels if label.startswith(f"{_ALL}.")}


def choose(pipeline: Any, request: GenerationRequest) -> Any:
    """The pipeline, with the ControlNet that the request names."""
    if not request.controls:
        return pipeline
    chosen = copy.copy(pipeline)
    chosen.__dict__[PART] = getattr(pipeline, _ALL)[request.controls[0].name]
    return chosen


def control_arguments(request: GenerationRequest, signature: CallSignature, *, image: str) -> dict[str, Any]:
    """The arguments for a request's ControlNet; `image` is the name of the control image's.

    Raises:
        InvalidRequest: there are several, or the pipeline cannot limit it to some steps.
    """
    if not request.controls:
        return {}
    control = request.controls[0]
    limits = {"control_guidance_start": (control.start, 0.0), "control_guidance_end": (control.end, 1.0)}
    if len(request.controls) > 1:
        raise InvalidRequest(
            "this model takes one ControlNet per job",
            field="controls",
            value=[control.name for control in request.controls],
            remedy="give one",
        )
    if request.control_image is not None:
        raise InvalidRequest(
            "is given twice, also in controls", field="control_image", value="given", remedy="leave it out"
        )
    for name, (value, usual) in limits.items():
        if name not in signature and value != usual:
            raise InvalidRequest(
                "this model applies its ControlNet in all steps",
                field=f"controls.0.{name.removeprefix('control_guidance_')}",
                value=value,
                remedy="leave out start and end",
            )
    return {
        image: Image.fromarray(control.image),
        "controlnet_conditioning_scale": control.scale,
        **{name: value for name, (value, _) in limits.items()},
    }
