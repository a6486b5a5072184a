"""`WorkerSettings`: one frozen object per worker process, from `CALOTYPE_WORKER_*` and the command line."""

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
    """NAME or NAME=SOURCE. Several, separated by commas, share the device and can be combined in one job."""
    lora: Annotated[str, Field(pattern=_adapters(_NAME))] = ""
    """LoRAs as [MODEL/]NAME=FILE, separated by commas. Without MODEL: for the first model."""
    embedding: Annotated[str, Field(pattern=_adapters(r"[^\s,=/]+"))] = ""
    """Textual inversions, in the same form as LoRAs. NAME is the token that prompts use."""
    control: Annotated[str, Field(pattern=_adapters(_NAME))] = ""
    """ControlNets, in the same form as LoRAs."""
    lora_capacity: Annotated[int, Field(ge=1)] = 8
    """Maximum number of LoRAs kept in memory per model."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """Device of this process: cpu or cuda:N."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Data type of the weights. None: float32 on a CPU, bfloat16 on a GPU that supports it, otherwise float16."""
    variant: Annotated[str, Field(pattern=r"^\w+$")] | None = None
    """Variant of the weights to load, such as `fp16`, in parts that have it. None: those without a name, else the
    variant that is there."""
    run_as: Literal["family", "pipeline"] = "family"
    """`pipeline`: run every model by its own diffusers pipeline, also the families that have a faster engine path."""
    max_rows: Annotated[int, Field(ge=2, le=1024)] = 32
    """Maximum rows of a step batch at the model's native size. Larger images get fewer rows."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Maximum number of bulk jobs in flight. None: max_rows + 8."""
    affinity: Annotated[int, Field(ge=0, le=1024)] = 64
    """How many queued jobs a claim searches for one whose image size already runs here, and how often a job may be
    passed over. 0: always the first job."""
    decode_batch: Annotated[int, Field(ge=1, le=64)] = 4
    """Maximum number of images decoded together."""
    deterministic: bool = False
    """Make images bit-identical regardless of batch composition, by a fixed number of rows. Costly at low load."""
    profile_seconds: Annotated[float, Field(ge=0.0)] = 5.0
    """Seconds spent at start-up measuring throughput by batch size. The worker then uses the smallest batch within
    5% of the best, the knee. 0: no measurement, max_rows is always used."""
    compile: Literal["off", "default", "reduce-overhead"] = "off"
    """Run steps as compiled graphs: faster, after about a minute of compilation."""
    compile_cache: str | None = None
    """Folder that keeps compiled graphs after this process ends. None: the system's temporary folder."""
    trace: str | None = None
    """File for a trace of every step, for [Perfetto](https://ui.perfetto.dev)."""
    deep_cache: Annotated[int, Field(ge=1, le=100)] = 1
    """Acceleration: run the whole U-Net only at every N-th step of an image. 1: at every step."""
    first_block_cache: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Acceleration: skip a transformer's other blocks while its first block's output has changed by at most this
    share. 0: never."""
    token_merging: Annotated[float, Field(ge=0.0, le=0.75)] = 0.0
    """Acceleration: share of a U-Net's tokens that are merged before self-attention, at the highest resolution."""
    quantized: Literal["off", "int8", "int8-dynamic", "float8"] = "off"
    """Acceleration: store the network's weights in 8 bits, by torchao."""
    memory_budget_gib: Annotated[float, Field(gt=0.0)] | None = None
    """Limit for weights on the device, in GiB; other models, or with `offload` other components, wait in main memory.
    None: all models stay on the device."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep only the active part on the device: `model` by component, `sequential` by layer, which is far slower."""
    attention_slicing: bool = False
    """Compute attention in slices: slower, with less memory."""
    vae_slicing: bool = False
    """Decode images one by one: slower, with less memory."""
    vae_tiling: bool = False
    """Decode large images in overlapping tiles. The seams can be visible."""
    lease_seconds: Annotated[float, Field(ge=1.0)] = 20.0
    """Duration of a lease. If a worker does not renew it in this time, others take over its jobs."""
    reap_seconds: Annotated[float, Field(ge=0.1, le=10.0)] = 5.0
    """Average pause between two searches for expired leases."""
    hang_seconds: Annotated[float, Field(ge=1.0)] = 60.0
    """A step that takes longer than this, and than 20 usual steps of its group, hangs: the worker exits with status 70
    and others take over its jobs. Loading a model, and steps of unknown duration, may take 10 times as long."""
    grace_seconds: Annotated[float, Field(ge=0.0)] = 60.0
    """Time for running jobs to finish after SIGTERM."""
    preemption: Annotated[str, Field(pattern=r"^(off|aws|gcp|azure|file:/.+)$")] = "off"
    """Source of notices that this machine will be taken away; the worker drains before that: `aws`, `gcp`, `azure`
    or `file:/PATH`."""
    preemption_endpoint: Annotated[AnyUrl, UrlConstraints(allowed_schemes=["http"], host_required=True)] | None = None
    """Address of the metadata service. None: `http://169.254.169.254`."""
    spool_dir: str | None = None
    """Folder for finished images while storage is unavailable. None: the system's temporary folder."""
    spool_mib: Annotated[int, Field(ge=0)] = 1024
    """Maximum size of the spool, in MiB. 0: no spool."""
    create_bucket: bool = True
    """Create the bucket if it does not exist."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] | None = None
    """Port for `/metrics`, `/healthz` and `/readyz`. None: disabled."""
    metrics_host: str = "127.0.0.1"
    """Address that the metrics port listens on; use `0.0.0.0` in a container."""
    log_format: Literal["text", "json"] = "text"
    """Log format: `text`, or `json` with one object per line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum level of logged events."""

    @property
    def sources(self) -> dict[str, str | None]:
        """Each model's folder, hub id (OWNER/NAME[@REVISION]) or .safetensors file; None for the bundled model."""
        pairs = [entry.partition("=") for entry in self.model.split(",")]
        return {name: source or None for name, _, source in pairs}

    def registered(self, kind: Literal["lora", "embedding", "control"], model: str) -> dict[str, str]:
        """The additions registered for a model: names and files."""
        found = {}
        for entry in filter(None, getattr(self, kind).split(",")):
            written, _, file = entry.partition("=")
            owner, slash, name = written.rpartition("/")
            if (owner if slash else next(iter(self.sources))) == model:
                found[name] = file
        return found

    @property
    def memory_budget(self) -> int | None:
        """Bytes of weights on the device, at most; None: no limit."""
        return None if self.memory_budget_gib is None else int(self.memory_budget_gib * 2**30)

    @property
    def jobs_in_flight(self) -> int:
        """Enough unguided jobs to fill a step batch, and some more being encoded and uploaded."""
        return self.concurrency or self.max_rows + 8
