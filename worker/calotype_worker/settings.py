"""`WorkerSettings`: one frozen object a worker process, from `CALOTYPE_WORKER_*` and the command line."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AnyUrl, Field, UrlConstraints
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

    model: Annotated[str, Field(pattern=rf"^{_MODEL}(,{_MODEL}){{0,{MAX_MODELS - 1}}}$")] = "demo"
    """NAME or NAME=SOURCE; several, separated by commas, share the device and can be used in one job."""
    lora: Annotated[str, Field(pattern=_adapters(_NAME))] = ""
    """[MODEL/]NAME=FILE, separated by commas; without MODEL for the first model."""
    embedding: Annotated[str, Field(pattern=_adapters(r"[^\s,=/]+"))] = ""
    """Textual inversions, written as LoRAs are; NAME is the token that prompts use."""
    control: Annotated[str, Field(pattern=_adapters(_NAME))] = ""
    """ControlNets, written as LoRAs are."""
    lora_capacity: Annotated[int, Field(ge=1)] = 8
    """LoRAs of a model in memory."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """The one device of this process: cpu or cuda:N."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the weights; none: float32 on a CPU, bfloat16 on a GPU that has it, else float16."""
    run_as: Literal["family", "pipeline"] = "family"
    """`pipeline`: every model by its own diffusers pipeline, also those that the engine has a faster way for."""
    max_rows: Annotated[int, Field(ge=2, le=1024)] = 32
    """Rows of a step batch at the model's native size, at most; fewer for larger images."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Jobs in flight; none: max_rows + 8."""
    affinity: Annotated[int, Field(ge=0, le=1024)] = 64
    """Jobs in line that a claim looks at for one of a size that runs here, and by how many a job may be passed over."""
    decode_batch: Annotated[int, Field(ge=1, le=64)] = 4
    """Images decoded together."""
    deterministic: bool = False
    """The same bits in any company, at a fixed number of rows; costly at low load."""
    profile_seconds: Annotated[float, Field(ge=0.0)] = 5.0
    """At the start, to find how many rows a step pays for, at most max_rows; 0: max_rows it is."""
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    """Steps as compiled graphs: faster, after about a minute of compiling."""
    compile_cache: str | None = None
    """Folder where compiled graphs outlive this process; none: the system's temporary folder."""
    trace: str | None = None
    """File for a trace of every step, for [Perfetto](https://ui.perfetto.dev)."""
    deep_cache: Annotated[int, Field(ge=1, le=100)] = 1
    """Accelerations: U-Nets run whole at every so many steps of an image; 1: at each."""
    first_block_cache: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Accelerations: change of a transformer's first block up to which the others are left out; 0: never."""
    token_merging: Annotated[float, Field(ge=0.0, le=0.75)] = 0.0
    """Accelerations: share of a U-Net's tokens without self-attention of their own, at the highest resolution."""
    quantized: Literal["off", "int8", "int8-dynamic", "float8"] = "off"
    """Accelerations: the network's weights in eight bits, by torchao."""
    memory_budget_gib: Annotated[float, Field(gt=0.0)] | None = None
    """Weights on the device; other models wait in main memory. None: all of them stay on the device."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Only what works is on the device: the part at work, or only the layer at work, which is far slower."""
    attention_slicing: bool = False
    """Attention in parts: slower, with less memory."""
    vae_slicing: bool = False
    """Images decoded one by one: slower, with less memory."""
    vae_tiling: bool = False
    """Large images decoded in overlapping tiles, which can show."""
    lease_seconds: Annotated[float, Field(ge=1.0)] = 20.0
    """After which a silent worker's jobs are taken over."""
    reap_seconds: Annotated[float, Field(ge=0.1, le=10.0)] = 5.0
    """Average pause between two searches for such jobs."""
    grace_seconds: Annotated[float, Field(ge=0.0)] = 60.0
    """After SIGTERM, for jobs in flight."""
    preemption: Annotated[str, Field(pattern=r"^(off|aws|gcp|azure|file:/.+)$")] = "off"
    """Where a notice appears that this machine will be taken away, to leave in good order before it is."""
    preemption_endpoint: Annotated[AnyUrl, UrlConstraints(allowed_schemes=["http"], host_required=True)] | None = None
    """Another address of that metadata service; none: `http://169.254.169.254`."""
    spool_dir: str | None = None
    """Where finished images wait while the storage is away; none: the system's temporary folder."""
    spool_mib: Annotated[int, Field(ge=0)] = 1024
    """At most so much waits there; 0: nothing does."""
    create_bucket: bool = True
    """Make the bucket when it is missing."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] | None = None
    """Where operators read `/metrics`, `/healthz` and `/readyz`; without it, nowhere."""
    metrics_host: str = "127.0.0.1"
    """Where that port listens; `0.0.0.0` in a container."""
    log_format: Literal["text", "json"] = "text"
    """`json`: one object a line, for machines."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""

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
