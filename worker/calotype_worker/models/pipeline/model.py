"""`PipelineModel`: a diffusers pipeline of any class, and how its requests run together."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent

from calotype_shared.errors import GenerationFailed, InvalidRequest, ModelLoadError
from calotype_shared.schema.enums import SamplerType
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.latent import Adapters
from calotype_worker.models.pipeline.adapters import NO_LORAS, load_loras, load_words, loras_of
from calotype_worker.models.pipeline.arguments import Arguments
from calotype_worker.models.pipeline.card import card_of, native_sizes, samplers_of, size_multiple
from calotype_worker.models.pipeline.controls import choose, share_roles
from calotype_worker.models.pipeline.copies import StandIns, parts
from calotype_worker.models.pipeline.module_state import ModuleState
from calotype_worker.models.pipeline.network_calls import NetworkCalls
from calotype_worker.models.pipeline.outputs import Output, read
from calotype_worker.models.pipeline.probe import Recording, learn_roles, record, rehearse
from calotype_worker.models.pipeline.roles import Place, Roles
from calotype_worker.models.pipeline.stand_in import CallingGreenlet
from calotype_worker.request import GenerationRequest
from calotype_worker.sampling.samplers import make_scheduler

log = logging.getLogger(__name__)

_PROBE_STEPS = 2
_PROBE_FRAMES = 9
_PROMPTS = ("a red circle", "a blue square", "one much longer prompt with a green star")


class PipelineModel:
    """Loaded in one thread; then `copy`, `start`, `calls` and `to` are for the engine's thread, the rest for any.

    `roles` states which networks' calls are merged; `changes` names a module that each run of the pipeline changes (its
    attention processors, usually): such requests share the device in turns, but no calls.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        name: str,
        version: str,
        device: torch.device,
        dtype: torch.dtype,
        notes: Mapping[str, Any] | None = None,
        merging: bool = True,
        adapters: Adapters | None = None,
    ) -> None:
        """Probe the pipeline, which is on the CPU, and move it to `device`.

        Raises:
            ModelLoadError: it fails when run, or does not take the adapters.
        """
        self.device = device
        self.dtype = dtype
        self._pipeline = pipeline
        adapters = adapters or Adapters()
        load_words(name, pipeline, adapters)
        self.arguments = Arguments(pipeline)
        self._stand_ins = StandIns(pipeline)
        for module in self.modules.values():
            module.eval()
            if type(module).__name__ == "ShapERenderer":
                module.mesh_decoder.register_forward_hook(_refuse_empty)  # type: ignore[union-attr]
        self.to(device)
        self.loras = load_loras(name, pipeline, self.modules, adapters)
        self._samplers = samplers_of(pipeline)
        self._watched = ModuleState.of(self.modules)
        self._plain_parameters: set[frozenset[str]] = {frozenset()}  # sets of names that change no network
        with torch.inference_mode(False), torch.no_grad():
            single, width, height = self._probe(name, native_sizes(pipeline, self.arguments, notes or {}))
            self.changes = single.changes
            self.card: ModelCard = card_of(
                name,
                pipeline,
                self.arguments,
                kind="mesh" if self.arguments.renders else self.read(single.result).kind,
                notes=notes or {},
                version=version,
                adapters=adapters,
            )
            self._phases = _phases(single)
            roles = self._learn(single, width, height) if merging and not self.changes else Roles()
            self.calls = NetworkCalls(roles, merging=merging and not self.changes)
            if self.calls.merging:
                self._rehearse(width, height)
        self._sizes = {label: _size_of(module) for label, module in self.modules.items()}
        log.info("pipeline probed", extra={"model": name, "pipeline": type(pipeline).__name__, **self.summary()})

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]:
        """The networks by name."""
        return self._stand_ins.modules

    def summary(self) -> dict[str, Any]:
        """Which calls are merged, and why others are not."""
        if self.changes:
            return {"merged": False, "reason": f"its runs change {self.changes}"}
        refused = sorted({f"{pattern[0][0][0]}: {reason}" for pattern, reason in self.calls.trust.refused})  # type: ignore[index]
        return {"merged": self.calls.merging, "alone": refused}

    # ---- any thread

    def group(self, request: GenerationRequest) -> tuple[Hashable, ...]:
        """The key that requests must share to run together."""
        return ("pipeline", request.width, request.height, request.num_frames)

    def area(self, group: tuple[Hashable, ...]) -> int:
        """Pixels of a request of a group; of the native size if the group is unknown."""
        width, height = self.card.native_sizes[0]
        return int(str(group[1])) * int(str(group[2])) if len(group) == 4 else width * height

    def check(self, request: GenerationRequest) -> None:
        """Refuse requests that the pipeline does not support.

        Raises:
            InvalidRequest: the pipeline or its samplers do not support it.
        """
        self.card.check_size(request.width, request.height)
        self.arguments.of(request, model=self.card.name)
        if request.sampler is not SamplerType.MODEL and request.sampler.value not in self.card.samplers:
            raise InvalidRequest(
                f"model {self.card.name!r} does not have it",
                field="sampler",
                value=request.sampler.value,
                remedy=f"use one of: {', '.join(self.card.samplers)}",
            )
        if self._replaces_scheduler(request):
            self._scheduler(request)

    # ---- the engine's thread

    def watched(self, request: GenerationRequest) -> ModuleState | None:
        """The networks' state, if this request's run may change it."""
        names = frozenset(request.parameters)
        if not self.changes and names in self._plain_parameters:
            return None
        self._watched.refresh()
        return self._watched

    def found_plain(self, request: GenerationRequest) -> None:
        """A run with these parameters has changed no network."""
        self._plain_parameters.add(frozenset(request.parameters))

    def start(self, request: GenerationRequest, follow: Callable[[Any], None]) -> Callable[[], Any]:
        """The function to run in a greenlet, which returns the input of `read`. `follow` gets its own scheduler."""
        pipeline = choose(self._stand_ins.copy(), request)
        if self._replaces_scheduler(request):
            pipeline.__dict__["scheduler"] = self._scheduler(request)
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None:
            follow(scheduler)
        arguments = self.arguments.of(request, model=self.card.name)
        return functools.partial(self._call, pipeline, arguments, guidance=request.guidance_scale, loras=request.loras)

    def read(self, result: Any) -> Output:
        """Read the outputs of a run.

        Raises:
            GenerationFailed: it has no output that can be stored.
        """
        output = read(result, sample_rate=_sample_rate(self._pipeline))
        if self.arguments.renders and output.frames is not None:
            # The last view equals the first, which would make a loop stutter.
            return dataclasses.replace(output, frames=output.frames[:-1])
        return output

    def plain(self, request: GenerationRequest) -> Any:
        """The result of diffusers itself for one request. Must not run beside others."""
        torch.manual_seed(request.seed)
        with torch.no_grad(), self._stand_ins.as_loaded():
            arguments = self.arguments.of(request, model=self.card.name)
            pipeline = choose(self._pipeline, request)
            return self._call(pipeline, arguments, guidance=request.guidance_scale, loras=request.loras)

    def _call(
        self, pipeline: Any, arguments: Mapping[str, Any], *, guidance: float, loras: Sequence[tuple[str, float]] = ()
    ) -> Any:
        if self.arguments.guider is not None:
            getattr(pipeline, self.arguments.guider).guidance_scale = guidance
        chosen, current = loras_of(self.loras, loras) if loras else NO_LORAS, getcurrent()
        if isinstance(current, CallingGreenlet):
            current.loras = chosen
            return pipeline(**arguments)
        with chosen.active():
            return pipeline(**arguments)

    def order(self, place: Place) -> float:
        """Sort key: calls with a lower value run first.

        Networks that run before the steps go first, so that requests start their steps together; within the steps the
        smaller network; last those that follow the last step.
        """
        return self._phases.get(place, 0) * 1e18 + self._sizes.get(place[0], 0)

    def to(self, device: torch.device) -> None:
        for module in self.modules.values():
            module.to(device)

    @property
    def weight_bytes(self) -> int:
        return sum(_size_of(module) for module in self.modules.values())

    # ---- loading

    def _probe(self, name: str, native: tuple[tuple[int, int], ...]) -> tuple[Recording, int, int]:
        """A short run at a small size, or if there is none at the native one; and that size."""
        multiple = size_multiple(self._pipeline)
        width, height = native[0]
        small = tuple(max(multiple, side // 4 // multiple * multiple) for side in (width, height))
        given = self._probe_arguments(*native[0])
        missing = [name for name in self.arguments.signature.required() if name not in given]
        if missing:
            raise ModelLoadError(
                f"model {name!r}: {type(self._pipeline).__name__} requires {', '.join(missing)}, which jobs cannot "
                "give; use a pipeline class that makes them itself"
            )
        problem: Exception | None = None
        for assumed in self.arguments.assumptions():
            self.arguments.assumed = assumed
            for size in dict.fromkeys(((min(small[0], width), min(small[1], height)), (width, height))):
                try:
                    start = functools.partial(self._probe_call, arguments=self._probe_arguments(*size))
                    return record(self._stand_ins, start), *size
                except Exception as error:
                    problem = error
                    log.debug("probe failed", extra={"model": name, "size": size}, exc_info=error)
        raise ModelLoadError(
            f"model {name!r}: a first run of {type(self._pipeline).__name__} failed: "
            f"{type(problem).__name__}: {problem}; check that the folder is complete and its parts fit together"
        ) from problem

    def _probe_call(self, pipeline: Any, *, arguments: Mapping[str, Any]) -> Any:
        return self._call(pipeline, arguments, guidance=self.arguments.default_guidance or 5.0)

    def _probe_request(self, width: int, height: int, *, prompt: str = _PROMPTS[0], seed: int = 0) -> GenerationRequest:
        return probe_request(self.arguments, width, height, prompt=prompt, seed=seed)

    def _probe_arguments(self, width: int, height: int) -> dict[str, Any]:
        return self._arguments_of(self._probe_request(width, height))

    def _arguments_of(self, request: GenerationRequest) -> dict[str, Any]:
        found = self.arguments.of(request, model="")
        # Views of an object take minutes on a CPU, and none of their calls are merged.
        return {**found, "output_type": "latent"} if self.arguments.renders else found

    def _learn(self, single: Recording, width: int, height: int) -> Roles:
        """Learn roles from a run for two requests; if it fails, all are guessed from shapes."""
        arguments = self._probe_arguments(width, height)
        for way in self.arguments.doubled(arguments, _PROMPTS[:2]):
            try:
                double = record(self._stand_ins, functools.partial(self._probe_call, arguments=way))
            except Exception as error:
                log.debug("probe for two failed", exc_info=error)
                continue
            roles = learn_roles(single, double)
            if roles.known:
                share_roles(roles, self.modules)
                return roles
        return Roles()

    def _rehearse(self, width: int, height: int) -> None:
        starts = []
        for index, prompt in enumerate(_PROMPTS):
            arguments = self._arguments_of(self._probe_request(width, height, prompt=prompt, seed=index))
            starts.append(functools.partial(self._probe_call, arguments=arguments))
        try:
            rehearse(self._stand_ins, self.calls, starts)
        except Exception as error:
            log.warning("rehearsal failed", extra={"reason": f"{type(error).__name__}: {error}"})

    def _replaces_scheduler(self, request: GenerationRequest) -> bool:
        return request.sampler in self._samplers and request.sampler.value != self.card.samplers[0]

    def _scheduler(self, request: GenerationRequest) -> Any:
        config = dict(self._pipeline.scheduler.config)
        return make_scheduler(request.sampler, config, request.num_inference_steps, samplers=self._samplers)


def probe_request(arguments: Arguments, width: int, height: int, *, prompt: str, seed: int) -> GenerationRequest:
    """A request that any pipeline with these arguments accepts: little work, all required inputs."""
    signature = arguments.signature
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    frames = signature.default("num_frames")
    needs = arguments.needs
    default = arguments.default_guidance
    return GenerationRequest(
        request_id="probe",
        prompt=prompt,
        width=width,
        height=height,
        num_inference_steps=_PROBE_STEPS,
        guidance_scale=default if default is not None and default > 1.0 else 4.0,
        seed=seed,
        sampler=SamplerType.MODEL,
        init_image=image if "init_image" in needs else None,
        mask=np.tile(np.arange(width) < width // 2, (height, 1)) if "mask_image" in needs else None,
        strength=1.0,
        images=((image,) * (_PROBE_FRAMES if arguments.video else 1)) if "images" in needs else (),
        parameters=signature.examples(),
        control_image=image if arguments.control is not None else None,
        num_frames=min(_PROBE_FRAMES, frames) if isinstance(frames, int) else 9 if "num_frames" in signature else None,
    )


def _phases(recording: Recording) -> Mapping[Place, int]:
    """-1 for what is called only before the steps, 1 for what is called only after them, 0 for what they call."""
    places = [call.place for call in recording.calls]
    first = {place: places.index(place) for place in places}
    last = {place: index for index, place in enumerate(places)}
    # The denoiser: what is called most, and last among those; an autoencoder is called for pieces of a long video.
    networks = [place for place in first if place[1] == "__call__"] or list(first)
    if not networks:
        return {}
    denoiser = max(networks, key=lambda place: (places.count(place), last[place]))
    return {
        place: -1 if last[place] < first[denoiser] else 1 if first[place] > last[denoiser] else 0 for place in first
    }


def _refuse_empty(module: torch.nn.Module, inputs: Any, surface: Any) -> None:
    if not len(surface.verts):
        raise GenerationFailed(
            "the object has no surface, so there is no mesh to write; use another prompt or seed, or more steps, "
            "or output_format gif to see what the model made of it"
        )


def _size_of(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _sample_rate(pipeline: Any) -> int:
    """Samples per second of a pipeline's sound."""
    for label, part in parts(pipeline):
        if label.rpartition(".")[2] in ("vocoder", "audio_vae", "vae"):
            config = getattr(part, "config", None)
            for name in ("output_sampling_rate", "sampling_rate", "sample_rate"):
                found = getattr(config, name, None)
                if isinstance(found, int):
                    return found
    return 16_000
