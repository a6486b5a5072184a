"""`FirstRuns`: short runs of a pipeline while it is loaded: what it requires, and how its calls go together."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from calotype_shared.errors import ModelLoadError
from calotype_shared.schema.enums import SamplerType
from calotype_worker.models.pipeline.arguments import Arguments
from calotype_worker.models.pipeline.copies import StandIns
from calotype_worker.models.pipeline.followed import Step, follow
from calotype_worker.models.pipeline.network_calls import NetworkCalls
from calotype_worker.models.pipeline.probe import Recording, learn_roles, record, rehearse
from calotype_worker.models.pipeline.roles import Roles
from calotype_worker.request import GenerationRequest

log = logging.getLogger(__name__)

_STEPS = 2
_FRAMES = 9
PROMPTS = ("a red circle", "a blue square", "one much longer prompt with a green star")


class FirstRuns:
    """Used once per pipeline: `alone`, then `roles` and `rehearse`."""

    def __init__(self, stand_ins: StandIns, arguments: Arguments, call: Callable[..., Any]) -> None:
        """`call` runs a pipeline with arguments and `guidance`.

        After `alone`, `latents` is what the scheduler of that run ended with.
        """
        self.latents: torch.Tensor | None = None
        self._stand_ins = stand_ins
        self._arguments = arguments
        self._call = call
        self._size = (0, 0)  # width and height of a run that succeeded

    def alone(self, name: str, kind: str, native: tuple[int, int], multiple: int) -> Recording:
        """A run at a small size, or if there is none at the native one.

        Raises:
            ModelLoadError: it fails, or requires what jobs cannot give.
        """
        self._check_arguments(name, kind, native)
        small = tuple(min(side, max(multiple, side // 4 // multiple * multiple)) for side in native)
        problem: Exception | None = None
        for assumed in self._arguments.assumptions():
            self._arguments.assumed = assumed
            for size in dict.fromkeys(((small[0], small[1]), native)):
                self._size = size
                try:
                    return record(self._stand_ins, functools.partial(self._followed, self._start(self._for())))
                except Exception as error:
                    problem = error
                    log.debug("first run failed", extra={"model": name, "size": size}, exc_info=error)
        remedy = "check that the folder is complete and its parts fit together"
        if "tiling" in str(problem):  # Allegro's autoencoder, for one, works only with it
            remedy = "start the worker with --vae-tiling"
        raise ModelLoadError(
            f"model {name!r}: a first run of {kind} failed: {type(problem).__name__}: {problem}; {remedy}"
        ) from problem

    def roles(self, single: Recording) -> Roles:
        """Learn roles from a run for two requests; if it fails, all are guessed from shapes."""
        for way in self._arguments.doubled(self._for(), PROMPTS[:2]):
            try:
                double = record(self._stand_ins, self._start(way))
            except Exception as error:
                log.debug("run for two failed", exc_info=error)
                continue
            roles = learn_roles(single, double)
            if roles.known:
                return roles
        return Roles()

    def rehearse(self, calls: NetworkCalls) -> str:
        """Run three requests together. Returns the error that ended it; empty: none."""
        starts = [self._start(self._for(prompt=prompt, seed=seed)) for seed, prompt in enumerate(PROMPTS)]
        try:
            rehearse(self._stand_ins, calls, starts)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            log.warning("rehearsal failed", extra={"reason": problem})
            return f"a rehearsal failed: {problem}"
        return ""

    def _followed(self, start: Callable[[Any], Any], pipeline: Any) -> Any:
        """A run whose scheduler's last latents are kept."""

        def stepped(step: Step) -> None:
            self.latents = step.result

        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not None:
            follow(scheduler, begun=lambda steps: None, stepped=stepped)
        return start(pipeline)

    def _check_arguments(self, name: str, kind: str, native: tuple[int, int]) -> None:
        self._size = native
        given = self._for()
        missing = [name for name in self._arguments.signature.required() if name not in given]
        if missing:
            raise ModelLoadError(
                f"model {name!r}: {kind} requires {', '.join(missing)}, which jobs cannot give; "
                "use a pipeline class that makes them itself"
            )

    def _for(self, *, prompt: str = PROMPTS[0], seed: int = 0) -> dict[str, Any]:
        request = probe_request(self._arguments, *self._size, prompt=prompt, seed=seed)
        found = self._arguments.of(request, model="")
        # Views of an object take minutes on a CPU, and none of their calls are merged.
        return {**found, "output_type": "latent"} if self._arguments.renders else found

    def _start(self, arguments: Mapping[str, Any]) -> Callable[[Any], Any]:
        guidance = self._arguments.default_guidance or 5.0
        return functools.partial(self._call, arguments=arguments, guidance=guidance)


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
        num_inference_steps=_STEPS,
        guidance_scale=default if default is not None and default > 1.0 else 4.0,
        seed=seed,
        sampler=SamplerType.MODEL,
        init_image=image if "init_image" in needs else None,
        mask=np.tile(np.arange(width) < width // 2, (height, 1)) if "mask_image" in needs else None,
        strength=1.0,
        images=((image,) * (_FRAMES if arguments.video else 1)) if "images" in needs else (),
        parameters=signature.examples(),
        control_image=image if arguments.control is not None else None,
        num_frames=min(_FRAMES, frames) if isinstance(frames, int) else 9 if "num_frames" in signature else None,
    )
