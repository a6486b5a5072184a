"""Quality presets: steps and guidance by one word."""

from __future__ import annotations

from collections.abc import Mapping

from calotype_shared.errors import InvalidRequest

# The numbers of the project's founding document.
QUALITY_PRESETS: Mapping[str, Mapping[str, int | float]] = {
    "fast": {"num_inference_steps": 20, "guidance_scale": 7.0},
    "balanced": {"num_inference_steps": 50, "guidance_scale": 7.5},
    "high": {"num_inference_steps": 100, "guidance_scale": 8.0},
}


def quality_preset(quality: str) -> Mapping[str, int | float]:
    """Steps and guidance of a preset: `fast`, `balanced` or `high`."""
    try:
        return QUALITY_PRESETS[quality]
    except KeyError:
        raise InvalidRequest(
            "unknown quality preset", field="quality", value=quality, remedy=f"use one of {', '.join(QUALITY_PRESETS)}"
        ) from None
