"""What a single-file checkpoint says about its noise levels: diffusers assumes those of the base model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open

from calotype_worker.models.header import Header


def scheduler_of(file: Path, header: Header, scheduler: Any) -> Any:
    """The scheduler for a U-Net checkpoint, from `scheduler`, which its configs give.

    The marks are tensors at the top of the file, as trainers and ComfyUI write them, or the metadata of the
    modelspec standard: `v_pred` (Salimans & Ho 2022), with `ztsnr` from zero terminal SNR (Lin et al. 2023), or EDM
    (CosXL, Playground 2.5).
    """
    import diffusers  # noqa: PLC0415 - takes seconds

    marks = header.tensors
    if "edm_mean" in marks and "edm_std" in marks:
        return diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    if "edm_vpred.sigma_max" in marks:
        levels = {"sigma_min": 0.002, **_numbers(file, marks, "edm_vpred.sigma_min", "edm_vpred.sigma_max")}
        return diffusers.EDMEulerScheduler(**levels, sigma_data=1.0, prediction_type="v_prediction")
    said = header.metadata.get("modelspec.prediction_type", "")
    if "v_pred" not in marks and said not in ("v", "v_prediction", "epsilon"):
        return scheduler
    zero = "ztsnr" in marks
    kind = type(scheduler)
    if zero and "rescale_betas_zero_snr" not in scheduler.config:
        kind = diffusers.EulerDiscreteScheduler  # which has it
    changes: dict[str, Any] = {"rescale_betas_zero_snr": True} if zero else {}
    prediction = "epsilon" if said == "epsilon" and "v_pred" not in marks else "v_prediction"
    return kind.from_config(scheduler.config, prediction_type=prediction, **changes)


def _numbers(file: Path, marks: Collection[str], *keys: str) -> dict[str, float]:
    """The values of those tensors of one number that the file has, by the last parts of their names."""
    with safe_open(file, framework="pt") as opened:
        return {key.rpartition(".")[2]: float(opened.get_tensor(key)) for key in keys if key in marks}
