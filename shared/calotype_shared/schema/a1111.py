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
    SamplerType.DPMPP_2M_SDE: "DPM++ 2M SDE",
    SamplerType.DPMPP_2M_SDE_KARRAS: "DPM++ 2M SDE Karras",
    SamplerType.DPMPP_3M: "DPM++ 3M",
    SamplerType.DPMPP_3M_SDE: "DPM++ 3M SDE",
    SamplerType.DPMPP_2S: "DPM++ 2S",
    SamplerType.DPM2: "DPM2",
    SamplerType.DPM2_A: "DPM2 a",
    SamplerType.DEIS: "DEIS",
    SamplerType.SA_SOLVER: "SA-Solver",
    SamplerType.EULER_KARRAS: "Euler Karras",
    SamplerType.UNIPC: "UniPC",
    SamplerType.UNIPC_3: "UniPC 3",
    SamplerType.LCM: "LCM",
    SamplerType.TCD: "TCD",
    SamplerType.MODEL: "Model's own",
}
_ALIASES = {
    "k_euler": "Euler",
    "k_euler_a": "Euler a",
    "k_heun": "Heun",
    "k_dpmpp_2m": "DPM++ 2M",
    "k_dpmpp_2m_sde": "DPM++ 2M SDE",
    "k_dpmpp_3m_sde": "DPM++ 3M SDE",
    "k_dpm_2": "DPM2",
    "k_dpm_2_a": "DPM2 a",
    "pndm": "PLMS",
}
SCHEDULERS = ("automatic", "karras")  # Karras' noise levels exist here for the samplers in _KARRAS
_KARRAS: Mapping[SamplerType, SamplerType] = {
    SamplerType.EULER: SamplerType.EULER_KARRAS,
    SamplerType.DPMPP_2M: SamplerType.DPMPP_2M_KARRAS,
    SamplerType.DPMPP_2M_SDE: SamplerType.DPMPP_2M_SDE_KARRAS,
}


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
    schedule = scheduler.lower()
    if schedule in ("automatic", "") or (schedule == "karras" and sampler in _KARRAS.values()):
        return sampler
    if schedule == "karras" and sampler in _KARRAS:
        return _KARRAS[sampler]
    raise InvalidRequest(
        f"is not available for {NAMES[sampler]}", field="scheduler", value=scheduler, remedy="use automatic"
    )
