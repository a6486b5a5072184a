"""`Admission`: the device work before a request's first step: encoding its text and its source image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from calotype_worker.engine.batch_row import InpaintBlend
from calotype_worker.engine.conditioning import ConditioningCache
from calotype_worker.engine.failure_isolation import is_fatal
from calotype_worker.engine.request_state import Stage
from calotype_worker.models.base import Conditioning, StepModel


class Admission:
    """Owned by the engine's thread."""

    def __init__(self, *, cache_capacity: int, together: bool) -> None:
        self._conditioning = ConditioningCache(capacity=cache_capacity, together=together)

    def admit(self, model: StepModel, stages: Sequence[Stage]) -> list[Exception | None]:
        """Set the members' conditioning and latents. Returns for each member None or its own error."""
        encoded = self._conditioning.encode(model, {text for stage in stages for text in stage.texts})
        outcomes: list[Exception | None] = []
        for stage in stages:
            texts = [encoded[text] for text in stage.texts]
            error = next((found for found in texts if isinstance(found, Exception)), None)
            if error is None:
                try:
                    self._fill(model, stage, [found for found in texts if not isinstance(found, Exception)])
                except Exception as raised:
                    if is_fatal(raised):
                        raise
                    error = raised
            outcomes.append(error)
        return outcomes

    def _fill(self, model: StepModel, stage: Stage, texts: Sequence[Conditioning]) -> None:
        row, request = stage.row, stage.row.request
        shared: Conditioning = {}
        if stage.source is not None:
            shared = _start(model, stage)
        row.conditioning = {**texts[0], **model.row_inputs(request, negative=False), **shared}
        if row.guided:
            row.negative = {**texts[1], **model.row_inputs(request, negative=True), **shared}
        row.controls = [
            (control, torch.from_numpy(control.image).to(model.device).permute(2, 0, 1).float() / 255)
            for control in request.controls
        ]


def _start(model: StepModel, stage: Stage) -> Conditioning:
    """The latents an image-to-image or inpainting request starts from; returns the network's further inputs."""
    source, row, request = stage.source, stage.row, stage.row.request
    assert source is not None
    assert request.init_image is not None
    pixels = (
        torch.from_numpy(np.ascontiguousarray(request.init_image)).permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
    )
    image = None if source.encoding is None else _sample(model, pixels, source.encoding)
    if row.latents is None:
        assert image is not None
        image_share, noise_share = source.noising[0].tolist()
        row.latents = image_share * image + noise_share * source.noise
    if request.mask is None:
        return {}
    painted = torch.from_numpy(request.mask).float().reshape(1, 1, *request.mask.shape)
    mask = torch.nn.functional.interpolate(painted, size=source.noise.shape[-2:])  # nearest, as diffusers' pipelines
    if model.mask_channels:
        assert source.masked_encoding is not None
        masked = _sample(model, pixels * (painted < 0.5), source.masked_encoding)
        return {"inpainting": torch.cat([mask[0], masked[0]])}
    assert image is not None
    row.kept = InpaintBlend(
        mask=mask[0].to(model.device),
        image=image[0].to(model.device),
        noise=source.noise[0].to(model.device),
        noising=source.noising,
    )
    return {}


def _sample(model: StepModel, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents of an image (1, 3, H, W) in -1..1, drawn with the request's own noise: (1, C, h, w) on the CPU."""
    mean, deviation = model.encode_images(pixels)
    return mean.cpu() + deviation.cpu() * noise
