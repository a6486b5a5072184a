"""Derives the matrix of a scheduler's step without knowing its formula.

Every linear sampler's step maps (sample, remembered tensors, model output, new noise) to (new sample, newly
remembered tensors). Passing basis vectors as inputs and reading the outputs gives this map's matrix. Tensors are
shaped (1, 1, 1, D), with one coordinate per input plus a few that no input uses, which show only the drawn noise.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Path = tuple[str | int, ...]  # the location of a remembered tensor, such as ("model_outputs", 1)

# In angle brackets, so that no attribute of a scheduler (Heun has one called `sample`) can be taken for them.
SAMPLE, OUTPUT, NOISE = ("<sample>",), ("<output>",), ("<noise>",)
_PURE_NOISE = 4  # coordinates that belong to no input
_MAX_REMEMBERED = 16  # a history longer than this has no useful table


class NotLinear(Exception):
    """This scheduler's step is not a fixed linear map, so each row needs a scheduler object."""


@dataclass(frozen=True, kw_only=True)
class ProbedStep:
    """One step: `new[row] = sum over column of weights[row][column] * old[column]`. Absent weights are zero."""

    input_scale: float  # network input = input_scale * sample
    draws_noise: bool  # whether the generator advanced, even if the noise had no effect
    weights: dict[Path, dict[Path, float]]


def probe_steps(scheduler: Any, timesteps: torch.Tensor) -> list[ProbedStep]:
    """Probe these steps of a scheduler whose timesteps are set. The scheduler itself is not changed.

    Raises:
        NotLinear: noise or input scaling is not a plain factor, or the history is unbounded.
    """
    scheduler = copy.deepcopy(scheduler)
    return [_probe_step(scheduler, timestep) for timestep in timesteps]


def step_arguments(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """Keyword arguments for `scheduler.step`, like diffusers' pipelines: the generator and eta 0, if accepted."""
    given = {"generator": generator, "eta": 0.0}
    return {"return_dict": False, **{name: given[name] for name in _accepted(type(scheduler).step)}}


@functools.cache
def _accepted(step: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in ("generator", "eta") if name in inspect.signature(step).parameters)


def scaled_input(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The network's input for a sample. Flow-matching schedulers do not scale it and have no method for it."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def _probe_step(scheduler: Any, timestep: torch.Tensor) -> ProbedStep:
    width = 3 + _MAX_REMEMBERED + _PURE_NOISE
    shape = (1, 1, 1, width)
    basis = torch.eye(width, dtype=torch.float64)
    columns: list[Path] = [SAMPLE, OUTPUT, NOISE]

    def replace(path: Path, _: torch.Tensor) -> torch.Tensor:
        if len(columns) >= width - _PURE_NOISE:
            raise NotLinear(f"{type(scheduler).__name__} remembers more than {_MAX_REMEMBERED} tensors")
        columns.append(path)
        return basis[len(columns) - 1].reshape(shape).clone()

    _visit_remembered(scheduler, shape, replace)
    sample, output = basis[0].reshape(shape).clone(), basis[1].reshape(shape).clone()
    scaled = scaled_input(scheduler, sample.clone(), timestep).flatten()
    input_scale = float(scaled[0])
    if not torch.allclose(scaled, basis[0] * input_scale):
        raise NotLinear(f"{type(scheduler).__name__} does not scale its input by a plain factor")

    generator = torch.Generator().manual_seed(0)
    untouched = generator.get_state()
    new_sample = scheduler.step(output, timestep, sample, **step_arguments(scheduler, generator))[0]
    draws_noise = not torch.equal(untouched, generator.get_state())

    results: dict[Path, torch.Tensor] = {SAMPLE: new_sample}
    _visit_remembered(scheduler, shape, results.setdefault)
    weights: dict[Path, dict[Path, float]] = {}
    for path, result in results.items():
        row = result.flatten().to(torch.float64)
        noise_weight, row = _split_noise(row, untouched) if draws_noise else (0.0, row)
        weights[path] = {column: w for column, w in zip(columns, row.tolist(), strict=False) if w != 0.0}
        if noise_weight:
            weights[path][NOISE] = noise_weight
    return ProbedStep(input_scale=input_scale, draws_noise=draws_noise, weights=weights)


def _split_noise(row: torch.Tensor, state: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Split `row` into the factor of the drawn noise and the row without noise.

    Schedulers draw in the model output's dtype or always in float32, and the two give different numbers, so both
    are tried: with the right one, a single factor explains the pure-noise coordinates.
    """
    pure = row[-_PURE_NOISE:]
    if not pure.any():
        return 0.0, row
    for dtype in (torch.float64, torch.float32):
        generator = torch.Generator()
        generator.set_state(state)
        noise = torch.randn((1, 1, 1, row.numel()), generator=generator, dtype=dtype).flatten().to(torch.float64)
        weight = float(pure @ noise[-_PURE_NOISE:] / noise[-_PURE_NOISE:].square().sum())
        if torch.allclose(pure, weight * noise[-_PURE_NOISE:], rtol=1e-4, atol=1e-7):
            clean = row - weight * noise
            # Remains of float32 rounding are not weights.
            return weight, torch.where(clean.abs() < 1e-6 * abs(weight), 0.0, clean)
    raise NotLinear("the drawn noise does not enter by a plain factor")


def _visit_remembered(
    scheduler: Any, shape: tuple[int, ...], visit: Callable[[Path, torch.Tensor], torch.Tensor]
) -> None:
    """Call `visit` on every latent-shaped tensor the scheduler holds, and store what it returns in its place."""

    def walk(value: Any, path: Path) -> Any:
        if isinstance(value, torch.Tensor) and value.shape == shape:
            return visit(path, value)
        if isinstance(value, list):
            return [walk(item, (*path, index)) for index, item in enumerate(value)]
        return value

    for name, value in list(vars(scheduler).items()):
        if isinstance(value, (torch.Tensor, list)):
            setattr(scheduler, name, walk(value, (name,)))
