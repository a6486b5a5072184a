"""`WorkerSettings`: one frozen object a worker process, from `CALOTYPE_WORKER_*` and the command line."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from calotype_shared.settings import StrictSettings


class WorkerSettings(StrictSettings):
    """How one worker process serves one model on one device."""

    model_config = SettingsConfigDict(env_prefix="CALOTYPE_WORKER_")

    model: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}(=.+)?$")] = "demo"  # NAME or NAME=SOURCE
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # None: float32 on a CPU, bfloat16 on a GPU
    max_rows: Annotated[int, Field(ge=2, le=1024)] = 32  # rows of a step batch, for pictures of native size
    concurrency: Annotated[int, Field(ge=1, le=1024)] | None = None  # jobs in flight; None: max_rows and some slack
    decode_batch: Annotated[int, Field(ge=1, le=64)] = 4
    deterministic: bool = False
    lease_seconds: Annotated[float, Field(ge=1.0)] = 20.0
    grace_seconds: Annotated[float, Field(ge=0.0)] = 60.0  # after SIGTERM, for jobs in flight
    create_bucket: bool = True
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def model_name(self) -> str:
        return self.model.partition("=")[0]

    @property
    def model_source(self) -> str | None:
        """A diffusers folder or hub id; None for the bundled model."""
        return self.model.partition("=")[2] or None

    @property
    def jobs_in_flight(self) -> int:
        """Enough unguided jobs to fill a step batch, and some more being encoded and uploaded."""
        return self.concurrency or self.max_rows + 8
