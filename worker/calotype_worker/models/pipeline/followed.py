"""Follows a pipeline's own scheduler: progress, and what a step predicts as the clean sample."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step of a scheduler, after it was taken."""

    scheduler: Any
    output: Any  # of the network, guided
    timestep: Any
    sample: Any  # before the step
    result: Any  # the sample after it

    def clean(self) -> torch.Tensor:
        """The estimate of the final sample where the scheduler's kind is known, otherwise the sample after the step."""
        found = _estimate(self)
        return self.result if found is None else found


class _Followed:
    """A method of one object, replaced by a function. Copies of the object get the method itself."""

    def __init__(self, method: MethodType, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)  # with its signature, which pipelines look up
        self._method = method
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(self._method.__func__, memo[id(self._method.__self__)])


def follow(scheduler: Any, *, begun: Callable[[int], None], stepped: Callable[[Step], None]) -> None:
    """Call `begun` with the number of timesteps when they are set, `stepped` after each step.

    Copies that the pipeline makes of its scheduler are not followed.
    """
    step, set_timesteps = scheduler.step, scheduler.set_timesteps
    signature = inspect.signature(step)

    def step_followed(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        stepped(
            Step(
                scheduler=scheduler,
                output=given.get("model_output"),
                timestep=given.get("timestep"),
                sample=given.get("sample"),
                result=result[0] if isinstance(result, tuple) else result.prev_sample,
            )
        )
        return result

    def timesteps_followed(*args: Any, **kwargs: Any) -> Any:
        result = set_timesteps(*args, **kwargs)
        begun(len(scheduler.timesteps))
        return result

    scheduler.step = _Followed(step, step_followed)
    scheduler.set_timesteps = _Followed(set_timesteps, timesteps_followed)


def _estimate(step: Step) -> torch.Tensor | None:
    """From the network's output, by what it predicts; None: not known."""
    output, sample = step.output, step.sample
    if not (isinstance(output, torch.Tensor) and isinstance(sample, torch.Tensor) and output.shape == sample.shape):
        return None
    flow = type(step.scheduler).__name__.startswith("FlowMatch")
    kind = "flow_prediction" if flow else getattr(step.scheduler.config, "prediction_type", "epsilon")
    shares = None if kind == "sample" else _shares(step, flow=kind == "flow_prediction")
    if shares is None:
        return output if kind == "sample" else None
    signal, noise = (share.to(sample.device) for share in shares)
    if kind == "v_prediction":
        square = signal**2 + noise**2
        return (signal * sample - noise * square.sqrt() * output) / square
    return (sample - noise * output) / (1.0 if kind == "flow_prediction" else signal)


def _shares(step: Step, *, flow: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    """How much of the clean sample and of unit noise are in the sample before the step; None: not known."""
    scheduler = step.scheduler
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    sigma = None if sigmas is None or not index else sigmas[index - 1]
    if flow:
        return None if sigma is None else (1 - sigma, sigma)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1.001:  # noise is added to the unscaled sample
        return None if sigma is None else (torch.ones_like(sigma), sigma)
    alpha = alphas[min(max(0, int(step.timestep)), len(alphas) - 1)]
    return alpha.sqrt(), (1 - alpha).sqrt()
