"""`WorkerInfo`: what a live worker says of itself every few seconds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class WorkerInfo(BaseModel):
    """A worker process. Counters are since its start; times are seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    model: str  # several are joined by +
    device: str
    host: str
    pid: int
    version: str
    started_at: float
    running_jobs: int = 0
    draining: bool = False
    forward_passes: int = 0
    rows: int = 0  # over all forward passes; rows / forward_passes is the mean step batch
    images: int = 0
    failed: int = 0
    step_seconds: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    idle_seconds: float = 0.0

    @property
    def models(self) -> tuple[str, ...]:
        """Every model it serves."""
        return tuple(self.model.split("+"))

    @property
    def mean_rows(self) -> float:
        return self.rows / self.forward_passes if self.forward_passes else 0.0
