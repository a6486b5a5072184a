"""`EngineStats`: what an engine has done since its start."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol


class Step(Protocol):
    """The report of one forward pass."""

    @property
    def rows(self) -> int: ...

    @property
    def padding_rows(self) -> int: ...

    @property
    def compiled(self) -> bool: ...

    @property
    def fallback_steps(self) -> int: ...


@dataclass(kw_only=True)
class EngineStats:
    """Owned by the engine's thread; other threads get copies from `Engine.stats`."""

    forward_passes: int = 0
    rows: int = 0  # rows of requests, without padding, over all forward passes
    padding_rows: int = 0  # rows added to reach a bucket
    images: int = 0
    failed: int = 0
    cancelled: int = 0
    fallback_steps: int = 0  # row steps taken by a scheduler object instead of a table
    out_of_memory: int = 0  # passes that ran out of device memory
    compiled_passes: int = 0  # forward passes that ran as a compiled graph
    in_flight: int = 0  # unresolved requests
    encode_seconds: float = 0.0
    step_seconds: float = 0.0  # network, guidance and sampler
    decode_seconds: float = 0.0
    idle_seconds: float = 0.0  # without work

    @property
    def mean_rows(self) -> float:
        """Mean number of rows of requests per forward pass."""
        return self.rows / self.forward_passes if self.forward_passes else 0.0

    def count_step(self, report: Step, seconds: float) -> None:
        self.forward_passes += 1
        self.rows += report.rows
        self.padding_rows += report.padding_rows
        self.compiled_passes += report.compiled
        self.fallback_steps += report.fallback_steps
        self.step_seconds += seconds

    def count_out_of_memory(self) -> None:
        self.out_of_memory += 1

    def snapshot(self, *, in_flight: int) -> EngineStats:
        """Thread-safe. Each number is consistent, but two may be one step apart."""
        return dataclasses.replace(self, in_flight=in_flight)
