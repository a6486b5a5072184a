"""`WorkerInfo`: the report that a live worker publishes every few seconds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class StepRow(BaseModel):
    """An image that is being generated: one row of a step batch, or two if it is guided.

    What a tenant sees of another tenant's image has no job, image or prompt.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    job: str | None = None
    image: int | None = Field(None, description="Its index in the job.")
    prompt: str | None = Field(None, description="Its first words; workers do not report them.")
    step: int = Field(description="Network evaluations done.")
    total_steps: int
    guided: bool


class StepGroup(BaseModel):
    """Images of one model and size, which go through the network together."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    width: int
    height: int
    budget: int = Field(description="Rows of a step, at most. A guided image takes two.")
    running: int = Field(description="Images in the step batch.")
    waiting: int = Field(description="Images that wait for a free row.")
    decoding: int = Field(description="Images that are done with their steps.")
    rows: tuple[StepRow, ...] = Field(description="In their order; only the first of them if there are many.")


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
    out_of_memory: int = 0  # forward passes that ran out of device memory
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
        """Of a step batch, since the start; 0 before the first."""
        return self.rows / self.forward_passes if self.forward_passes else 0.0
