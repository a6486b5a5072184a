"""`Arguments`: how a request's fields become the arguments of a pipeline's `__call__`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import Feature
from calotype_worker.models.pipeline.controls import control_arguments
from calotype_worker.models.pipeline.copies import parts
from calotype_worker.models.pipeline.outputs import NAMES
from calotype_worker.models.pipeline.signature import CallSignature
from calotype_worker.request import GenerationRequest

_FURTHER_IMAGES = ("example_image", "reference_image", "last_image", "image_2")
_FRAME_RATES = ("frame_rate", "fps")
_DURATIONS = ("audio_length_in_s", "audio_duration", "audio_end_in_s", "duration")
_GUIDANCE = ("guidance_scale", "true_cfg_scale", "max_guidance_scale", "prior_guidance_scale")
_CONTROL_VIDEOS = ("conditioning_frames", "control_video")
_CONTROL_IMAGES = ("control_image", "hint", "condtioning_image", *_CONTROL_VIDEOS)
_FRAMES = 9  # of a control video, where nothing says how many


class Arguments:
    """Created once per pipeline. Thread-safe."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.signature = signature = CallSignature.of(pipeline)
        self.outputs = [name for name in signature.outputs if name in NAMES]
        self.guidance = next((name for name in _GUIDANCE if name in signature), None)
        if "true_cfg_scale" in signature and not _embeds_guidance(pipeline):
            self.guidance = "true_cfg_scale"
        self.guider = next((name for name, part in vars(pipeline).items() if _is_guider(part)), None)
        self.frame_rate = next((name for name in _FRAME_RATES if name in signature), None)
        self.duration = next((name for name in _DURATIONS if name in signature), None)
        self.control = next((name for name in _CONTROL_IMAGES if name in signature), None)
        controlled = any(name.startswith("controlnet") for name, _ in parts(pipeline))
        if signature.modular and not controlled:
            self.control = None  # the blocks for it have no network
        if self.control is None and controlled and "image" in signature and "strength" not in signature:
            self.control = "image"
        takes_image = "image" in signature and self.control != "image"
        self.starts = takes_image and ("strength" in signature or "mask_image" in signature)
        self.edits = takes_image and not self.starts
        self.mask = "mask_image" in signature
        self.video = "video" in signature
        self.renders = "frame_size" in signature  # square views of an object
        self.assumed: frozenset[str] = frozenset()  # required as first runs showed, though not by the signature
        unet = getattr(pipeline, "unet", None)
        self.max_frames: int | None = getattr(getattr(unet, "config", None), "motion_max_seq_length", None)

    @property
    def features(self) -> frozenset[str]:
        """The pipeline's `Feature`s, except those that depend on its outputs."""
        signature = self.signature
        found = {
            Feature.INPAINTING: self.mask,
            Feature.IMAGE_TO_IMAGE: self.starts and "strength" in signature and not self._required("mask_image"),
            Feature.EDIT: self.edits or self.video,
            Feature.CONTROL_IMAGE: self.control is not None,
        }
        return frozenset(feature.value for feature, given in found.items() if given)

    @property
    def needs_image(self) -> bool:
        """Whether the pipeline requires an image."""
        return any(self._required(name) for name in ("image", "video", "mask_image"))

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a config that the pipeline requires."""
        found = {
            "init_image": self.starts and self.needs_image,
            "mask_image": self._required("mask_image"),
            "images": self.needs_image and not self.starts,
            "control_image": self.control is not None and (not self.signature.modular or self._required(self.control)),
        }
        return tuple(name for name, needed in found.items() if needed)

    def _required(self, name: str) -> bool:
        return name in self.signature and (name in self.assumed or self.signature.parameters[name].required)

    def assumptions(self) -> list[frozenset[str]]:
        """Sets of images that the pipeline may require, though its signature does not say so; to be tried in order."""
        sets: list[frozenset[str]] = [frozenset()]
        for name, taken in (("image", self.starts or self.edits), ("mask_image", self.mask), ("video", self.video)):
            if taken and not self._required(name):
                sets.append(sets[-1] | {name})
        return sets

    @property
    def default_steps(self) -> int | None:
        found = self.signature.default("num_inference_steps")
        return int(found) if found else None

    @property
    def default_guidance(self) -> float | None:
        found = None if self.guidance is None else self.signature.default(self.guidance)
        if self.guider is not None:
            found = getattr(getattr(self._pipeline, self.guider), "guidance_scale", None)
        return float(found) if isinstance(found, int | float) else None

    def of(self, request: GenerationRequest, *, model: str) -> dict[str, Any]:
        """The arguments for a request. Thread-safe.

        Raises:
            InvalidRequest: the pipeline does not accept something in the request, or requires something missing.
        """
        self.signature.check(model, request.parameters)
        self._refuse(request, model)
        guided = request.guidance_scale > 1.0
        found: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt or None,
            "height": request.height,
            "width": request.width,
            "num_inference_steps": request.num_inference_steps,
            "num_frames": self.frames(request),
        }
        if self.guidance is not None:
            found[self.guidance] = request.guidance_scale
        if self.guidance == "true_cfg_scale" and guided:
            found["negative_prompt"] = request.negative_prompt or " "  # without one there is no guidance
        if self.frame_rate is not None:
            found[self.frame_rate] = request.fps
        if self.duration is not None:
            found[self.duration] = request.audio_seconds
        if "max_area" in self.signature:
            found["max_area"] = request.width * request.height  # to which it would resize what was asked for
        if "frame_size" in self.signature:
            found["frame_size"] = request.width
        found |= self._images(request)
        given = {name: value for name, value in found.items() if value is not None and name in self.signature}
        given |= dict(request.parameters)
        if "generator" in self.signature:
            given["generator"] = torch.Generator().manual_seed(request.seed)
        if "output_type" in self.signature:
            given["output_type"] = self.output_type(request)
        if self.signature.modular:
            given["output"] = self.outputs
        return given

    def frames(self, request: GenerationRequest) -> int | None:
        """The frame rate of the request's video; None: the pipeline's default."""
        default = self.signature.default("num_frames")
        if request.num_frames is None and self.max_frames is not None and isinstance(default, int):
            return min(default, self.max_frames)
        return request.num_frames

    def output_type(self, request: GenerationRequest) -> str:
        """The value of `output_type`."""
        formats = request.output_format
        if formats is not None and formats.value == "ply":
            return "mesh"
        # Modular inpainting lays the image over the original only in this form.
        return "pil" if self.signature.modular and request.mask is not None else "np"

    def doubled(self, arguments: Mapping[str, Any], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Variants of `arguments` that request two results instead of one, the most informative first."""
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        common = {**arguments, **({"generator": generators} if "generator" in self.signature else {})}
        images = {name: [value] * 2 for name, value in arguments.items() if isinstance(value, Image.Image)}
        ways = []
        if "prompt" in self.signature:
            named = {"prompt": list(prompts)}
            if isinstance(arguments.get("negative_prompt"), str):
                named["negative_prompt"] = [arguments["negative_prompt"]] * 2
            ways += [{**common, **images, **named}, {**common, **named}]
        else:
            lists = {name: arguments[name] * 2 for name in self.signature.examples() if type(arguments[name]) is list}
            if images or lists:
                ways.append({**common, **images, **lists})
        ways += [
            {**common, name: 2}
            for name in ("batch_size", "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
            if name in self.signature
        ]
        return ways

    def _images(self, request: GenerationRequest) -> dict[str, Any]:
        images = [_pil(image) for image in request.images]
        found: dict[str, Any] = {}
        if request.init_image is not None:
            found["image"] = _pil(request.init_image)
            if "strength" in self.signature:
                found["strength"] = request.strength
        elif images and self.edits:
            further = [name for name in _FURTHER_IMAGES if name in self.signature][: len(images) - 1]
            first = images[: len(images) - len(further)]
            found["image"] = first[0] if len(first) == 1 else first
            found |= dict(zip(further, images[len(first) :], strict=True))
        if images and self.video:
            found["video"] = images
        if request.mask is not None:
            found["mask_image"] = Image.fromarray(request.mask.astype(np.uint8) * 255)
        if self.control is not None:
            found |= control_arguments(request, self.signature, image=self.control)
            if request.control_image is not None:
                found[self.control] = _pil(request.control_image)
            if self.control in _CONTROL_VIDEOS and self.control in found:  # the same image for all frames
                length = len(request.images) if self.video else self.frames(request)
                found[self.control] = [found[self.control]] * (
                    length or self.signature.default("num_frames") or _FRAMES
                )
        return found

    def _refuse(self, request: GenerationRequest, model: str) -> None:
        """The same checks as the card's for queued jobs, for in-process callers."""
        if self.renders and request.width != request.height:
            raise InvalidRequest(
                f"the views of model {model!r} are square, and the width is {request.width}",
                field="height",
                value=request.height,
                remedy=f"use {request.width}",
            )
        if self.max_frames is not None and (request.num_frames or 1) > self.max_frames:
            raise InvalidRequest(
                f"the motion modules of model {model!r} span {self.max_frames} frames",
                field="num_frames",
                value=request.num_frames,
                remedy=f"use 1 to {self.max_frames}",
            )
        takes = {
            "init_image": (request.init_image is not None, self.starts),
            "mask_image": (request.mask is not None, self.mask),
            "images": (bool(request.images), self.edits or self.video),
            "control_image": (request.control_image is not None, self.control is not None),
            "num_frames": (request.num_frames is not None, "num_frames" in self.signature),
            "fps": (request.fps is not None, "num_frames" in self.signature),
            "audio_seconds": (request.audio_seconds is not None, self.duration is not None),
            "negative_prompt": (
                bool(request.negative_prompt),
                "negative_prompt" in self.signature,
            ),
            "refiner": (request.refiner is not None, False),
        }
        for field, (given, taken) in takes.items():
            if given and not taken:
                raise InvalidRequest(
                    f"model {model!r} does not take it", field=field, value="given", remedy="leave it out"
                )
        for field in self.needs:
            if field not in request.given:
                raise InvalidRequest(f"model {model!r} needs it", field=field, value=None, remedy="give it")


def _pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image)


def _is_guider(value: Any) -> bool:
    return any(base.__name__ == "BaseGuidance" for base in type(value).__mro__)


def _embeds_guidance(pipeline: Any) -> bool:
    """Whether the network reads the guidance scale itself."""
    network = getattr(pipeline, "transformer", None)
    return bool(getattr(getattr(network, "config", None), "guidance_embeds", False))
