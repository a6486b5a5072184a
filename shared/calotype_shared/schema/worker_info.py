"""`WorkerInfo`: what a live worker says of itself every few seconds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StepRow(BaseModel):
    """An image that is being made: its row of a step batch, or its two rows if it is guided."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job: str
    image: int  # of the job's
    step: int  # network evaluations done
    total_steps: int
    guided: bool


class StepGroup(BaseModel):
    """Images of one model and size, which go through the network together."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    width: int
    height: int
    budget: int  # rows of a step, at most
    running: int  # images in the step batch
    waiting: int  # for a place
    decoding: int  # done with their steps
    rows: tuple[StepRow, ...]  # in their order; the first of them, where there are many


class WorkerInfo(BaseModel):
    """A worker process. Counters are since its start; times are seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    model: str  # several are joined by +
    device: str
    host: str
    pid: int
    version: str
    schema_number: int = 1  # the newest of the jobs it can do
    left_for_newer: tuple[str, ...] = ()  # queues whose next job needs a worker of a newer version
    started_at: float
    running_jobs: int = 0
    draining: bool = False
    forward_passes: int = 0
    rows: int = 0  # over all forward passes; rows / forward_passes is the mean step batch
    images: int = 0
    failed: int = 0
    out_of_memory: int = 0  # passes that the device had too little memory for
    step_seconds: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    idle_seconds: float = 0.0
    groups: tuple[StepGroup, ...] = ()  # at the moment of the report

    @property
    def models(self) -> tuple[str, ...]:
        """Every model it serves."""
        return tuple(self.model.split("+"))

    @property
    def mean_rows(self) -> float:
        return self.rows / self.forward_passes if self.forward_passes else 0.0
