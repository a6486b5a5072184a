"""`SamplerTable`: a whole sampler trajectory as one small matrix per step.

A row keeps the state `S = [x, s_1 … s_K]` (K remembered tensors) and advances by `S' = M_i · [S; m; n]`, where m is
the guided model output, n new noise and i the row's own step; the network sees `input_scale_i · x`. The matrices
are derived from the diffusers scheduler itself (`probe.py`) and checked against it on a random trajectory.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from calotype_shared.errors import InvalidRequest
from calotype_worker.sampling.probe import (
    NOISE,
    OUTPUT,
    SAMPLE,
    NotLinear,
    Path,
    ProbedStep,
    probe_steps,
    scaled_input,
    step_arguments,
)
from calotype_worker.sampling.trajectory import Trajectory, probe_noising

# Largest error of a table over a whole random trajectory, relative to the trajectory's largest value; the
# scheduler's own float32 rounding reaches 1.3e-5 (Heun with few steps).
TOLERANCE = 5e-5


@dataclass(frozen=True, kw_only=True)
class SamplerTable:
    """A sampler's N steps with K remembered tensors.

    Columns of a matrix are `[x, s_1 … s_K, m, n]`, rows `[x, s_1 … s_K]`. N counts network evaluations: PNDM makes
    one more than the number of steps, Heun nearly twice as many.
    """

    matrices: torch.Tensor  # (N, K+1, K+3) float32
    input_scale: torch.Tensor  # (N,) float32
    timesteps: torch.Tensor  # (N,) float32
    draws_noise: tuple[bool, ...]  # (N,): draw from the row's generator here, even if the weight is zero
    initial_sigma: float  # x_0 = randn * initial_sigma

    def __len__(self) -> int:
        return len(self.draws_noise)

    @property
    def remembered(self) -> int:
        """K."""
        return self.matrices.shape[1] - 1

    def widened(self, remembered: int) -> torch.Tensor:
        """The matrices for a state with more remembered tensors than this sampler has: (N, remembered+1, +3)."""
        own = self.remembered
        wide = torch.zeros(len(self), remembered + 1, remembered + 3)
        wide[:, : own + 1, : own + 1] = self.matrices[:, :, : own + 1]
        wide[:, : own + 1, remembered + 1 :] = self.matrices[:, :, own + 1 :]
        return wide


def build_table(trajectory: Trajectory) -> SamplerTable:
    """Probe a trajectory of a diffusers scheduler, and verify the result.

    Raises:
        NotLinear: no table describes this scheduler; use a scheduler object per row.
        InvalidRequest: the scheduler does not support this number of steps, or its values are not finite.
    """
    scheduler = trajectory.scheduler
    try:
        steps = probe_steps(scheduler, trajectory.timesteps)
    except NotLinear:
        raise
    except Exception as error:
        # Schedulers raise various errors if they cannot step: 1,000 steps from a config with an offset
        # of one, for instance, run off the end of its own table with an IndexError.
        raise InvalidRequest(
            f"{type(scheduler).__name__} does not support this number of steps ({error})",
            field="num_inference_steps",
            value=len(trajectory.timesteps),
            remedy="use fewer steps, or another sampler",
        ) from error
    table = SamplerTable(
        matrices=_pack(steps).to(torch.float32),
        input_scale=torch.tensor([step.input_scale for step in steps], dtype=torch.float32),
        timesteps=trajectory.timesteps.to(torch.float32).clone(),
        draws_noise=tuple(step.draws_noise for step in steps),
        initial_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
    )
    if not (table.matrices.isfinite().all() and table.input_scale.isfinite().all()):
        raise InvalidRequest(
            f"{type(scheduler).__name__} returns values that are not finite",
            field="num_inference_steps",
            value=len(steps),
            remedy="use more steps, or another sampler",
        )
    off = trajectory_error(table, trajectory)
    if not off <= TOLERANCE:
        raise NotLinear(f"{type(scheduler).__name__}: the table is off by {off:.1e} of the trajectory")
    return table


def trajectory_error(table: SamplerTable, trajectory: Trajectory) -> float:
    """Largest difference between table and scheduler over a random trajectory, relative to its largest value."""
    scheduler = copy.deepcopy(trajectory.scheduler)
    source = torch.Generator().manual_seed(1)  # samples and model outputs
    ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))  # the noise both must draw alike
    shape = (1, 4, 4, 4)
    sample = torch.randn(shape, generator=source) * table.initial_sigma
    state = torch.zeros(table.remembered + 1, sample.numel())
    state[0] = sample.flatten()
    arguments = step_arguments(scheduler, theirs)
    wanted, found = [sample.flatten()], [state[0]]
    for index, timestep in enumerate(trajectory.timesteps):
        wanted.append(scaled_input(scheduler, sample, timestep).flatten())
        found.append(state[0] * table.input_scale[index])
        output = torch.randn(shape, generator=source)
        sample = scheduler.step(output, timestep, sample, **arguments)[0]
        noise = torch.randn(shape, generator=ours) if table.draws_noise[index] else torch.zeros(shape)
        state = table.matrices[index] @ torch.cat([state, output.reshape(1, -1), noise.reshape(1, -1)])
        wanted.append(sample.flatten())
        found.append(state[0])
    exact = torch.stack(wanted)
    return float((torch.stack(found) - exact).abs().max() / exact.abs().max())


def _pack(steps: list[ProbedStep]) -> torch.Tensor:
    """Assign slots to remembered tensors, dropping those that are not read later: (N, K+1, K+3) float64."""
    live: list[list[Path]] = [[]]  # live[i]: what must be remembered between step i - 1 and step i
    for step in reversed(steps):
        needed = [SAMPLE, *live[0]]
        used = {column for row in needed for column in step.weights.get(row, {})}
        live.insert(0, sorted(used - {SAMPLE, OUTPUT, NOISE}, key=str))
    if live[0]:
        raise NotLinear("the first step reads something remembered from before it")
    remembered = max(len(paths) for paths in live)
    matrices = torch.zeros(len(steps), remembered + 1, remembered + 3, dtype=torch.float64)
    for index, step in enumerate(steps):
        columns = {path: slot for slot, path in enumerate([SAMPLE, *live[index]])}
        columns |= {OUTPUT: remembered + 1, NOISE: remembered + 2}
        for slot, row in enumerate([SAMPLE, *live[index + 1]]):
            for column, weight in step.weights.get(row, {}).items():
                matrices[index, slot, columns[column]] = weight
    return matrices


class TableCache:
    """Tables by everything they depend on; evicts the least recently used. Thread-safe.

    A cached None means that there is no table, so each row needs a scheduler object.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._capacity = capacity
        self._tables: OrderedDict[Hashable, SamplerTable | None] = OrderedDict()
        self._noisings: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make_trajectory: Callable[[], Trajectory]) -> SamplerTable | None:
        """The table of `key`. The first time, it is probed from the result of `make_trajectory`."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        try:
            table = build_table(make_trajectory())
        except NotLinear:
            table = None
        with self._lock:
            self._tables[key] = table
            while len(self._tables) > self._capacity:
                self._tables.popitem(last=False)
        return table

    def noising(self, key: Hashable, make_trajectory: Callable[[], Trajectory]) -> torch.Tensor:
        """How a clean image is noised along that trajectory: `probe_noising`, cached in the same way."""
        with self._lock:
            if key in self._noisings:
                self._noisings.move_to_end(key)
                return self._noisings[key]
        found = probe_noising(make_trajectory())
        with self._lock:
            self._noisings[key] = found
            while len(self._noisings) > self._capacity:
                self._noisings.popitem(last=False)
        return found


def product(matrices: torch.Tensor, stacked: torch.Tensor) -> torch.Tensor:
    """Each row's matrix times its column of tensors: (n, K+1, K+3) x (n, K+3, L) -> (n, K+1, L).

    Computed as sums of products, column by column: a batched matrix product selects its kernel, and so the order of its
    sums, by n and K, so a row's last bits would depend on other rows. Here adding zeros for a larger K is exact.
    """
    result = matrices[:, :, 0, None] * stacked[:, None, 0]
    for column in range(1, stacked.shape[1]):
        result = result + matrices[:, :, column, None] * stacked[:, None, column]
    return result
