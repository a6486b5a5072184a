"""`EngineSettings`: how an engine uses its device."""

from __future__ import annotations

from dataclasses import dataclass

from calotype_shared.errors import InvalidRequest
from calotype_worker.engine.compiled import CompileMode


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How many rows a step batch has, and what is given up for that or for the same bits.

    `max_rows` is for images of the model's native area and shrinks as the area grows; `Engine.profile` may find
    that fewer serve as well. `row_buckets` pads every forward pass to one of a few sizes, for compiled graphs.
    `deterministic` makes an image the same bit for bit whatever stood beside it, by one fixed number of rows (a power
    of two): costly at low load. Where the device's memory is too small for that number, a smaller one is used from then
    on, whose bits may be others.
    """

    max_rows: int = 32
    row_buckets: tuple[int, ...] = ()
    decode_batch: int = 4  # images decoded together
    decode_max_wait_steps: int = 4  # steps a finished latent waits for company at most
    conditioning_cache: int = 512  # prompts
    model_switch_delay_steps: int = 50  # steps a model that is not on the device waits for those that are
    compile: CompileMode = "off"
    deterministic: bool = False

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
