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
from calotype_shared.schema.enums import Feature, SamplerType
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.latent import Adapters, Memory
from calotype_worker.models.pipeline.adapters import NO_LORAS, load_loras, load_words, loras_of
from calotype_worker.models.pipeline.arguments import Arguments
from calotype_worker.models.pipeline.card import card_of, native_sizes, samplers_of, size_multiple
from calotype_worker.models.pipeline.controls import choose, share_roles
from calotype_worker.models.pipeline.copies import StandIns
from calotype_worker.models.pipeline.first_runs import PROMPTS, FirstRuns
from calotype_worker.models.pipeline.followed import Step
from calotype_worker.models.pipeline.merging import DETERMINISTIC, all_alone, merging_of
from calotype_worker.models.pipeline.module_state import ModuleState
from calotype_worker.models.pipeline.network_calls import NetworkCalls
from calotype_worker.models.pipeline.outputs import Output, read, sample_rate
from calotype_worker.models.pipeline.placement import Placement, save_memory, size_of
from calotype_worker.models.pipeline.preview import Previews
from calotype_worker.models.pipeline.probe import Recording
from calotype_worker.models.pipeline.roles import Place, Roles
from calotype_worker.models.pipeline.row_split import RowSplit
from calotype_worker.models.pipeline.stand_in import CallingGreenlet
from calotype_worker.models.pipeline.weights import PromptWeights
from calotype_worker.request import GenerationRequest
from calotype_worker.sampling.samplers import make_scheduler

log = logging.getLogger(__name__)


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
        memory: Memory | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """Probe the pipeline, which is on the CPU, and move it to `device`.

        Raises:
            ModelLoadError: it fails when run, or does not take the adapters or an option of `memory`.
        """
        self.device = device
        self.dtype = dtype
        self._pipeline = pipeline
        adapters = adapters or Adapters()
        load_words(name, pipeline, adapters)
        self.arguments = Arguments(pipeline)
        self._stand_ins = StandIns(pipeline, device=device, place_weights=self._place_weights)
        for module in self.modules.values():
            module.eval()
            if type(module).__name__ == "ShapERenderer":
                module.mesh_decoder.register_forward_hook(_refuse_empty)  # type: ignore[union-attr]
        self._placement = self._placed(name, memory or Memory(), adapters)
        self.loras = load_loras(name, pipeline, self.modules, adapters)
        self._samplers = samplers_of(pipeline)
        self._watched = ModuleState.of(self.modules)
        self._plain_parameters: set[frozenset[str]] = {frozenset()}  # sets of names that change no network
        self._weights: PromptWeights | None = None
        with torch.inference_mode(False), torch.no_grad():
            runs = FirstRuns(self._stand_ins, self.arguments, self._call)
            native = native_sizes(pipeline, self.arguments, notes or {})
            single = runs.alone(name, type(pipeline).__name__, native[0], size_multiple(pipeline))
            self.changes = single.changes
            self.card: ModelCard = card_of(
                name,
                pipeline,
                self.arguments,
                kind=self._kind(name, single.result),
                notes=notes or {},
                version=version,
                adapters=adapters,
            )
            self._previews = self._find_previews(runs, single)
            self._weights = self._read_weights(single)
            self._phases = single.phases()
            merging = merging and not self.changes
            roles = runs.roles(single) if merging else Roles()
            share_roles(roles, self.modules)
            self.calls = NetworkCalls(roles, merging=merging)
            self.split = RowSplit(self.calls)
            problem = runs.rehearse(self.calls) if merging else ""
            if merging:
                self.split.learn(single.calls)
        self.card = self.card.model_copy(update={"networks": merging_of(single, self.calls, problem)})
        self._sizes = {label: size_of(module) for label, module in self.modules.items()}
        log.info("pipeline probed", extra={"model": name, "pipeline": type(pipeline).__name__, **self.summary()})

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]:
        """The networks by name."""
        return self._stand_ins.modules

    def summary(self) -> dict[str, Any]:
        """Which calls are merged, and why others are not."""
        if self.changes:
            return {"merged": False, "reason": f"its runs change {self.changes}"}
        refused = sorted({f"{network}: {reason}" for network, reason in self.calls.trust.refused})
        return {"merged": self.calls.merging, "alone": refused}

    def run_alone(self) -> None:
        """Merge nothing from now on: each result is bit for bit that of diffusers. Before the engine starts."""
        self.calls.merging = False
        networks = all_alone([entry.network for entry in self.card.networks], DETERMINISTIC)
        self.card = self.card.model_copy(update={"networks": networks})

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
        output = read(result, sample_rate=sample_rate(self._pipeline))
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
            return pipeline(**self._embedded(arguments))
        with chosen.active():
            return pipeline(**self._embedded(arguments))

    def _embedded(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return arguments if self._weights is None else self._weights.applied(arguments)

    def order(self, place: Place) -> float:
        """Sort key: calls with a lower value run first.

        Networks that run before the steps go first, so that requests start their steps together; within the steps the
        smaller network; last those that follow the last step.
        """
        return self._phases.get(place, 0) * 1e18 + self._sizes.get(place[0], 0)

    def preview(self, request: GenerationRequest, step: Step) -> np.ndarray | None:
        """A rough image after one of its steps, uint8 (h, w, 3), one pixel per latent cell; None: there is none."""
        return None if self._previews is None else self._previews.image(step.clean(), request.width, request.height)

    def to(self, device: torch.device) -> None:
        self._placement.to(device)

    def _place_weights(self, network: str) -> None:
        self._placement.use(network)

    @property
    def weight_bytes(self) -> int:
        """The most that is on the device at once."""
        return self._placement.weight_bytes

    # ---- loading

    def _placed(self, name: str, memory: Memory, adapters: Adapters) -> Placement:
        """The networks where they are to be at first."""
        if adapters.loras and memory.offload == "sequential":
            raise ModelLoadError(
                f"model {name!r}: LoRAs of a pipeline do not go with --offload sequential; use --offload model, or "
                "leave out --lora"
            )
        save_memory(name, self.modules, memory)
        pinned = getattr(self._pipeline, "_exclude_from_cpu_offload", ())
        placement = Placement(self.modules, self.device, memory, pinned=pinned)
        placement.settle()
        return placement

    def _find_previews(self, runs: FirstRuns, single: Recording) -> Previews | None:
        """How to show latents; the card gets the feature. None: the pipeline has no previews."""
        found = Previews.of(runs.latents, single.calls, self._place_weights)
        if found is not None:
            features = self.card.features | {Feature.PREVIEW.value}
            self.card = self.card.model_copy(update={"features": features})
        return found

    def _read_weights(self, single: Recording) -> PromptWeights | None:
        """How to read weighted prompts; the card gets the feature. None: the pipeline cannot."""
        signature = self.arguments.signature
        found = PromptWeights.of(self._stand_ins.copy(), signature, single, PROMPTS[0], self.device)
        if found is not None:
            features = self.card.features | {Feature.PROMPT_WEIGHTS.value}
            self.card = self.card.model_copy(update={"features": features})
        return found

    def _kind(self, name: str, result: Any) -> str:
        """The kind of what a run returns."""
        if self.arguments.renders:
            return "mesh"
        try:
            return self.read(result).kind
        except GenerationFailed as error:
            raise ModelLoadError(
                f"model {name!r}: a first run of {type(self._pipeline).__name__} failed: {error}"
            ) from error

    def _replaces_scheduler(self, request: GenerationRequest) -> bool:
        return request.sampler in self._samplers and request.sampler.value != self.card.samplers[0]

    def _scheduler(self, request: GenerationRequest) -> Any:
        config = dict(self._pipeline.scheduler.config)
        return make_scheduler(request.sampler, config, request.num_inference_steps, samplers=self._samplers)


def _refuse_empty(module: torch.nn.Module, inputs: Any, surface: Any) -> None:
    if not len(surface.verts):
        raise GenerationFailed(
            "the object has no surface, so there is no mesh to write; use another prompt or seed, or more steps, "
            "or output_format gif to see what the model made of it"
        )
