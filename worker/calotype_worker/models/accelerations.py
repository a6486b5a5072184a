"""`Accelerations`: options that trade image fidelity for speed or memory. All are off by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from calotype_shared.errors import InvalidRequest

if TYPE_CHECKING:
    from calotype_worker.request import GenerationRequest

Quantized = Literal["off", "int8", "int8-dynamic", "float8"]
MOST_MERGED = 0.75  # one token of each 2x2 square stays


@dataclass(frozen=True, kw_only=True)
class Accelerations:
    """The accelerations of one model. docs/accelerations.md describes what each gains and costs.

    `deep_cache`: one of this many steps runs the whole U-Net; the others run only its outermost blocks.
    `first_block_cache`: a transformer's other blocks are skipped for a row while its first block's residual has changed
    by at most this share since they last ran.
    `token_merging`: the share of a U-Net's tokens that are merged for self-attention, at the highest resolution.
    `quantized`: the weights of the network's attention and feed-forward layers, by torchao.

    Raises:
        InvalidRequest: a value is out of range.
    """

    deep_cache: int = 1
    first_block_cache: float = 0.0
    token_merging: float = 0.0
    quantized: Quantized = "off"

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("deep_cache", self.deep_cache, 1, 100),
            ("first_block_cache", self.first_block_cache, 0.0, 1.0),
            ("token_merging", self.token_merging, 0.0, MOST_MERGED),
        ):
            if not least <= value <= most:
                raise InvalidRequest("is out of range", field=name, value=value, remedy=f"use {least} (off) to {most}")

    @property
    def caches(self) -> bool:
        """Whether something of an image is kept from step to step."""
        return self.deep_cache > 1 or self.first_block_cache > 0

    def used_for(self, request: GenerationRequest) -> tuple[str, ...]:
        """The entries for an image's provenance. Images with ControlNets do not use caches."""
        cached = self.caches and not request.controls
        used = (
            (f"deep_cache:{self.deep_cache}", cached and self.deep_cache > 1),
            (f"first_block_cache:{self.first_block_cache:g}", cached and self.first_block_cache > 0),
            (f"token_merging:{self.token_merging:g}", self.token_merging > 0),
            (f"quantized:{self.quantized}", self.quantized != "off"),
        )
        return tuple(name for name, on in used if on)

    def check(self, *, deterministic: bool, compiled: bool) -> None:
        """Refuse combinations that an engine's settings do not allow.

        Raises:
            InvalidRequest: names the setting and the remedy.
        """
        named = {"deep_cache": self.deep_cache, "first_block_cache": self.first_block_cache}
        cache = next((name for name, value in named.items() if value not in (0, 1)), "")
        if deterministic and cache:
            raise InvalidRequest(
                "runs blocks for some of the rows only, so that bits depend on batch composition",
                field=cache,
                value=named[cache],
                remedy="turn it off, or turn off deterministic",
            )
        if deterministic and self.token_merging:
            raise InvalidRequest(
                "sums merged tokens in an order that is not fixed on a GPU, so that bits can differ",
                field="token_merging",
                value=self.token_merging,
                remedy="turn it off, or turn off deterministic",
            )
        if compiled and cache:
            raise InvalidRequest(
                "decides for each row what to run, which a compiled graph cannot do",
                field=cache,
                value=named[cache],
                remedy="turn it off, or turn off compile",
            )


EXACT = Accelerations()
