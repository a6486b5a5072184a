"""AnimateDiff (Guo et al. 2023): video from a Stable Diffusion 1.x U-Net with motion modules between its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from calotype_shared.errors import GenerationFailed, InvalidRequest
from calotype_shared.schema.enums import Feature, OutputFormat
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.base import Watch
from calotype_worker.models.opaque.whole_pipeline import WholePipeline, own_generators, samplers_of, sizes_of
from calotype_worker.request import Generated, GenerationRequest
from calotype_worker.sampling.samplers import SAMPLERS, Sampler

DEFAULT_FRAMES = 16  # what the published motion modules are trained on
_AREA_LIMIT = 4  # times the native area


class AnimateDiff(WholePipeline):
    """An `OpaqueModel` around a diffusers `AnimateDiffPipeline`.

    One run has one scheduler and one guidance scale, so requests share sampler, steps, size, frames and guidance;
    prompts, negative prompts and seeds are each request's own.
    """

    samplers: ClassVar[Mapping[Any, Sampler]] = SAMPLERS

    @classmethod
    def card_of(cls, name: str, pipeline: Any, notes: Mapping[str, Any], version: str) -> ModelCard:
        side = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
        native = sizes_of(notes, [(side, side)])
        return ModelCard(
            name=name,
            family="animatediff",
            version=version,
            size_multiple=pipeline.vae_scale_factor,
            native_sizes=native,
            max_pixels=_AREA_LIMIT * max(width * height for width, height in native),
            max_prompt_tokens=int(pipeline.tokenizer.model_max_length),
            samplers=samplers_of(pipeline, cls.samplers),
            features=frozenset({Feature.TEXT_TO_VIDEO.value}),
            output_formats=(OutputFormat.GIF.value, OutputFormat.MP4.value),
            description=str(notes.get("description", "")),
        )

    def __init__(
        self, pipeline: Any, *, card: ModelCard, device: torch.device, dtype: torch.dtype, max_batch: int = 4
    ) -> None:
        # The U-Net was built with the motion modules' weights: the adapter that they came in is a second copy.
        pipeline.register_modules(motion_adapter=None)
        super().__init__(pipeline, card=card, device=device, dtype=dtype, max_batch=max_batch)
        self._max_frames = int(pipeline.unet.config.motion_max_seq_length)
        if getattr(pipeline.vae.config, "force_upcast", False) and dtype is torch.float16:
            pipeline.vae.to(torch.float32)  # its activations overflow fp16

    def batch_key(self, request: GenerationRequest) -> tuple[Any, ...]:
        self._check(request)
        frames = self._frames(request)
        if not 1 <= frames <= self._max_frames:
            raise InvalidRequest(
                f"model {self.card.name!r} makes at most {self._max_frames} frames",
                field="num_frames",
                value=frames,
                remedy=f"use 1 to {self._max_frames}",
            )
        guidance = request.guidance_scale if request.guided else 1.0
        return request.sampler, request.num_inference_steps, request.width, request.height, frames, guidance

    def run(self, requests: Sequence[GenerationRequest], watch: Watch) -> Sequence[Generated | None]:
        """Videos of (F, H, W, 3) frames, each with its middle frame as the image.

        Raises:
            GenerationFailed: a video holds numbers that are not finite.
        """
        ids = [request.request_id for request in requests]
        if watch(0).issuperset(ids):
            return [None] * len(requests)
        first = requests[0]
        pipeline = self._pipeline
        pipeline.scheduler = self._make_scheduler(first)
        steps = len(pipeline.scheduler.timesteps)

        def after_step(running: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
            running._interrupt = watch(step + 1).issuperset(ids)  # the pipeline skips its remaining steps
            return {}

        with torch.inference_mode():
            latents = pipeline(  # (B, C, F, h, w)
                prompt=[request.prompt for request in requests],
                negative_prompt=[request.negative_prompt for request in requests],
                generator=own_generators(requests),
                width=first.width,
                height=first.height,
                num_frames=self._frames(first),
                num_inference_steps=first.num_inference_steps,
                guidance_scale=first.guidance_scale,
                output_type="latent",
                callback_on_step_end=after_step,
            ).frames
        if pipeline.interrupt:
            return [None] * len(requests)
        made: list[Generated | None] = []
        for request, own in zip(requests, latents, strict=True):
            if request.request_id in watch(steps):
                made.append(None)
                continue
            frames = self._decode(own, request)
            made.append(
                Generated(
                    request_id=request.request_id,
                    image=frames[len(frames) // 2],
                    frames=frames,
                    seed=request.seed,
                    steps_taken=steps,
                    model=request.model,
                )
            )
        return made

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor, request: GenerationRequest) -> np.ndarray:
        """Frames uint8 (F, H, W, 3) of latents (C, F, h, w)."""
        pixels = self._pipeline.decode_latents(latents[None].to(self._pipeline.vae.dtype))[0]  # (3, F, H, W) in -1..1
        if not pixels.isfinite().all():
            raise GenerationFailed(
                f"request {request.request_id!r}: its video is not finite; use a lower guidance scale, or load the "
                "model in bfloat16 or float32"
            )
        return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()

    def _frames(self, request: GenerationRequest) -> int:
        return min(DEFAULT_FRAMES, self._max_frames) if request.num_frames is None else request.num_frames
