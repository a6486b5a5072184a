"""`EngineSettings`: how an engine uses its device."""

from __future__ import annotations

from dataclasses import dataclass

from calotype_shared.errors import InvalidRequest
from calotype_worker.engine.compiled import CompileMode


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The size of step batches, and the balance between throughput, latency and bit-identical images.

    `max_rows` applies to images of the model's native area and shrinks as the area grows; `Engine.profile` may find
    that fewer rows are just as fast. `row_buckets` pads every forward pass to one of a few sizes, for compiled graphs.
    `deterministic` makes images bit-identical whatever runs beside them, by one fixed number of rows (a power of two),
    which is expensive at low load. If the device's memory is too small for that number, a smaller one is used from then
    on, which may produce other bits. `hang_seconds`: a step that takes longer, and 20 times longer than usual, hangs.
    """

    max_rows: int = 32
    row_buckets: tuple[int, ...] = ()
    decode_batch: int = 4  # images decoded together
    decode_max_wait_steps: int = 4  # maximum steps that a finished latent waits for others
    conditioning_cache: int = 512  # prompts
    model_switch_delay_steps: int = 50  # steps that a model waits while others are on the device
    compile: CompileMode = "off"
    deterministic: bool = False
    hang_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.deterministic and self.compile != "off":
            raise InvalidRequest(
                "compiled graphs are not bit-identical for different numbers of rows",
                field="compile",
                value=self.compile,
                remedy="turn off compile or deterministic",
            )
        for name, value, least in (
            ("max_rows", self.max_rows, 2),  # a guided request alone needs two
            ("decode_batch", self.decode_batch, 1),
            ("decode_max_wait_steps", self.decode_max_wait_steps, 0),
            ("conditioning_cache", self.conditioning_cache, 2),
            ("model_switch_delay_steps", self.model_switch_delay_steps, 0),
        ):
            if value < least:
                raise InvalidRequest("is too small", field=name, value=value, remedy=f"use at least {least}")
