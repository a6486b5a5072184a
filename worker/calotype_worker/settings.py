"""`WorkerSettings`: one frozen object a worker process, from `CALOTYPE_WORKER_*` and the command line."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from calotype_shared.settings import StrictSettings

MAX_MODELS = 4  # a worker listens to a queue for every subset of its models
_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
_MODEL = rf"{_NAME}(=[^,]+)?"


def _adapters(name: str) -> str:
    """A pattern for [MODEL/]NAME=FILE, separated by commas."""
    entry = rf"({_NAME}/)?{name}=[^,]+"
    return rf"^({entry}(,{entry})*)?$"


class WorkerSettings(StrictSettings):
    """How one worker process serves one model on one device."""

    model_config = SettingsConfigDict(env_prefix="CALOTYPE_WORKER_")

    # NAME or NAME=SOURCE; several, separated by commas, share the device and can be used in one job.
    model: Annotated[str, Field(pattern=rf"^{_MODEL}(,{_MODEL}){{0,{MAX_MODELS - 1}}}$")] = "demo"
    # [MODEL/]NAME=FILE, separated by commas; without MODEL for the first model. For an embedding NAME is its token.
    lora: Annotated[str, Field(pattern=_adapters(_NAME))] = ""
    embedding: Annotated[str, Field(pattern=_adapters(r"[^\s,=/]+"))] = ""
    control: Annotated[str, Field(pattern=_adapters(_NAME))] = ""
    lora_capacity: Annotated[int, Field(ge=1)] = 8  # LoRAs of a model in memory
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # None: float32 on a CPU, bfloat16 on a GPU
    max_rows: Annotated[int, Field(ge=2, le=1024)] = 32  # rows of a step batch, for pictures of native size
    concurrency: Annotated[int, Field(ge=1, le=1024)] | None = None  # jobs in flight; None: max_rows and some slack
    decode_batch: Annotated[int, Field(ge=1, le=64)] = 4
    deterministic: bool = False
    memory_budget_gib: Annotated[float, Field(gt=0.0)] | None = None  # weights on the device; None: all models
    offload: Literal["none", "model", "sequential"] = "none"
    attention_slicing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    lease_seconds: Annotated[float, Field(ge=1.0)] = 20.0
    grace_seconds: Annotated[float, Field(ge=0.0)] = 60.0  # after SIGTERM, for jobs in flight
    create_bucket: bool = True
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def sources(self) -> dict[str, str | None]:
        """Each model's diffusers folder, hub id or .safetensors file; None for the bundled model."""
        pairs = [entry.partition("=") for entry in self.model.split(",")]
        return {name: source or None for name, _, source in pairs}

    def registered(self, kind: Literal["lora", "embedding", "control"], model: str) -> dict[str, str]:
        """What was registered for a model: names and files."""
        found = {}
        for entry in filter(None, getattr(self, kind).split(",")):
            written, _, file = entry.partition("=")
            owner, slash, name = written.rpartition("/")
            if (owner if slash else next(iter(self.sources))) == model:
                found[name] = file
        return found

    @property
    def jobs_in_flight(self) -> int:
        """Enough unguided jobs to fill a step batch, and some more being encoded and uploaded."""
        return self.concurrency or self.max_rows + 8
