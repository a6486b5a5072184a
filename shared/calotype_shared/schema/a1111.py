"""Sampler names of AUTOMATIC1111's web UI, as used in its image files and by its clients."""

from __future__ import annotations

from collections.abc import Mapping

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import SamplerType

NAMES: Mapping[SamplerType, str] = {
    SamplerType.DDPM: "DDPM",
    SamplerType.DDIM: "DDIM",
    SamplerType.PNDM: "PLMS",
    SamplerType.EULER: "Euler",
    SamplerType.EULER_A: "Euler a",
    SamplerType.HEUN: "Heun",
    SamplerType.DPMPP_2M: "DPM++ 2M",
    SamplerType.DPMPP_2M_KARRAS: "DPM++ 2M Karras",
    SamplerType.UNIPC: "UniPC",
    SamplerType.LCM: "LCM",
    SamplerType.MODEL: "Model's own",
}
_ALIASES = {"k_euler": "Euler", "k_euler_a": "Euler a", "k_heun": "Heun", "k_dpmpp_2m": "DPM++ 2M", "pndm": "PLMS"}
SCHEDULERS = ("automatic", "karras")  # Karras' noise levels exist here for DPM++ 2M only


def aliases(sampler: SamplerType) -> list[str]:
    """Further names that its clients use for a sampler."""
    return [sampler.value, *(alias for alias, name in _ALIASES.items() if name == NAMES[sampler])]


def sampler_named(name: str, scheduler: str = "automatic") -> SamplerType:
    """The sampler for the name and the noise schedule of a request.

    Raises:
        InvalidRequest: the sampler does not exist, or does not have this schedule.
    """
    wanted = _ALIASES.get(name.lower(), name).lower()
    by_name = {shown.lower(): sampler for sampler, shown in NAMES.items()} | {s.value: s for s in SamplerType}
    sampler = by_name.get(wanted)
    if sampler is None:
        raise InvalidRequest(
            "is not a known sampler",
            field="sampler_name",
            value=name,
            remedy=f"use one of: {', '.join(NAMES.values())}",
        )
    if scheduler.lower() == "karras" and sampler is SamplerType.DPMPP_2M:
        return SamplerType.DPMPP_2M_KARRAS
    if scheduler.lower() not in ("automatic", "") and not (
        scheduler.lower() == "karras" and sampler is SamplerType.DPMPP_2M_KARRAS
    ):
        raise InvalidRequest(
            f"is not available for {NAMES[sampler]}", field="scheduler", value=scheduler, remedy="use automatic"
        )
    return sampler
