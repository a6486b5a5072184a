"""`FirstRuns`: short runs of a pipeline when it is loaded, which show what it makes and which calls can be merged."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from calotype_shared.errors import ModelLoadError
from calotype_shared.schema.enums import SamplerType
from calotype_shared.schema.model_card import NetworkMerging
from calotype_worker.models.pipeline.arguments import Arguments
from calotype_worker.models.pipeline.card import size_multiple
from calotype_worker.models.pipeline.controls import share_roles
from calotype_worker.models.pipeline.copies import StandIns
from calotype_worker.models.pipeline.followed import Step, follow
from calotype_worker.models.pipeline.network_calls import NetworkCalls
from calotype_worker.models.pipeline.probe import Recording, learn_roles, record, rehearse
from calotype_worker.models.pipeline.roles import Place, Roles
from calotype_worker.models.pipeline.row_split import RowSplit
from calotype_worker.request import GenerationRequest

log = logging.getLogger(__name__)

DETERMINISTIC = "merging is off in deterministic mode"
_PROBE_STEPS = 2
_PROBE_FRAMES = 9
_PROMPTS = ("a red circle", "a blue square", "one much longer prompt with a green star")


class FirstRuns:
    """`single` is a run for one request, `height` pixels high, `latents` what its scheduler ended with.

    `calls` are ready for the engine.

    `phases`: -1 for what is called only before the steps, 1 for what is called only after them, 0 for what they call.
    """

    def __init__(
        self,
        pipeline: Any,
        stand_ins: StandIns,
        arguments: Arguments,
        call: Callable[..., Any],
        *,
        name: str,
        native: tuple[tuple[int, int], ...],
        merging: bool,
    ) -> None:
        """Run it by `call(pipeline, arguments, guidance=…)`, at a small size if that works.

        Raises:
            ModelLoadError: it fails at its native size, too.
        """
        self._pipeline, self._stand_ins, self._arguments, self._call = pipeline, stand_ins, arguments, call
        self.latents: torch.Tensor | None = None
        self.single, width, height = self._first(name, native)
        self.height = height
        self.phases = _phases(self.single)
        self._problem = ""
        merging = merging and not self.single.changes
        self.calls = NetworkCalls(self._learn(width, height) if merging else Roles(), merging=merging)
        self.split = RowSplit(self.calls)
        if merging:
            self._rehearse(width, height)
            self.split.learn(self.single.calls)

    @property
    def networks(self) -> tuple[NetworkMerging, ...]:
        """For each network, whether its calls are merged, and why not."""
        names = dict.fromkeys(call.component for call in self.single.calls)
        if self.single.changes:
            return alone(names, f"each run changes {self.single.changes}")
        if not self.calls.merging:
            return alone(names, DETERMINISTIC)
        refused: dict[str, list[str]] = {}
        for network, reason in self.calls.trust.refused:
            refused.setdefault(network, []).append(reason)
        verified = Counter({name: count for (name, how), count in self.calls.trust.counts.items() if how == "verified"})
        reasons = {
            name: "; ".join(sorted(set(refused.get(name, []))))
            or ("" if verified[name] else self._problem or "no two calls of the first runs could be merged")
            for name in names
        }
        return tuple(
            NetworkMerging(network=name, merged=verified[name] > 0, reason=reason) for name, reason in reasons.items()
        )

    def _first(self, name: str, native: tuple[tuple[int, int], ...]) -> tuple[Recording, int, int]:
        """A short run at a small size, or if there is none at the native one; and that size."""
        multiple = size_multiple(self._pipeline)
        width, height = native[0]
        small = tuple(max(multiple, side // 4 // multiple * multiple) for side in (width, height))
        problem: Exception | None = None
        for assumed in self._arguments.assumptions():
            self._arguments.assumed = assumed
            for size in dict.fromkeys(((min(small[0], width), min(small[1], height)), (width, height))):
                try:
                    start = functools.partial(self._watched_run, arguments=self._small_arguments(*size))
                    return record(self._stand_ins, start), *size
                except Exception as error:
                    problem = error
                    log.debug("probe failed", extra={"model": name, "size": size}, exc_info=error)
        raise ModelLoadError(
            f"model {name!r}: a first run of {type(self._pipeline).__name__} failed: "
            f"{type(problem).__name__}: {problem}; check that the folder is complete and its parts fit together"
        ) from problem

    def _watched_run(self, pipeline: Any, *, arguments: Mapping[str, Any]) -> Any:
        """A run that keeps what its scheduler ends with."""

        def stepped(step: Step) -> None:
            self.latents = step.result

        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None:
            follow(scheduler, begun=lambda steps: None, stepped=stepped)
        return self._run(pipeline, arguments=arguments)

    def _run(self, pipeline: Any, *, arguments: Mapping[str, Any]) -> Any:
        return self._call(pipeline, arguments, guidance=self._arguments.default_guidance or 5.0)

    def _small_arguments(self, width: int, height: int, *, prompt: str = _PROMPTS[0], seed: int = 0) -> dict[str, Any]:
        request = probe_request(self._arguments, width, height, prompt=prompt, seed=seed)
        found = self._arguments.of(request, model="")
        # Views of an object take minutes on a CPU, and none of their calls are merged.
        return {**found, "output_type": "latent"} if self._arguments.renders else found

    def _learn(self, width: int, height: int) -> Roles:
        """Learn roles from a run for two requests; if it fails, all are guessed from shapes."""
        for way in self._arguments.doubled(self._small_arguments(width, height), _PROMPTS[:2]):
            try:
                double = record(self._stand_ins, functools.partial(self._run, arguments=way))
            except Exception as error:
                log.debug("probe for two failed", exc_info=error)
                continue
            roles = learn_roles(self.single, double)
            if roles.known:
                share_roles(roles, self._stand_ins.modules)
                return roles
        return Roles()

    def _rehearse(self, width: int, height: int) -> None:
        starts = []
        for index, prompt in enumerate(_PROMPTS):
            arguments = self._small_arguments(width, height, prompt=prompt, seed=index)
            starts.append(functools.partial(self._run, arguments=arguments))
        try:
            rehearse(self._stand_ins, self.calls, starts)
        except Exception as error:
            self._problem = f"a rehearsal failed: {type(error).__name__}: {error}"
            log.warning("rehearsal failed", extra={"reason": f"{type(error).__name__}: {error}"})


def alone(networks: Sequence[str] | Mapping[str, Any], reason: str) -> tuple[NetworkMerging, ...]:
    """None of them merged, for one reason."""
    return tuple(NetworkMerging(network=name, merged=False, reason=reason) for name in networks)


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
        control_image=image if arguments.control is not None else None,
        num_frames=min(_PROBE_FRAMES, frames) if isinstance(frames, int) else 9 if "num_frames" in signature else None,
    )


def _phases(recording: Recording) -> Mapping[Place, int]:
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
