"""What the benchmarks of the queue share: a model that exists only as a card."""

from __future__ import annotations

from calotype import ModelCard
from calotype_shared.schema.enums import SamplerType

CARD = ModelCard(
    name="simulated",
    family="sd",
    version="1",
    size_multiple=8,
    native_sizes=((512, 512),),
    max_pixels=1024 * 1024,
    max_prompt_tokens=77,
    samplers=tuple(SamplerType),
)
