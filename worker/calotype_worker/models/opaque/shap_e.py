"""Shap-E (Jun & Nichol 2023): 3D objects.

A prior denoises latents that are the weights of a small network, which says for every point in space its density, its
signed distance to the surface and its color.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import HeunDiscreteScheduler

from calotype_shared.errors import GenerationFailed, InvalidRequest
from calotype_shared.schema.enums import Feature, OutputFormat, SamplerType
from calotype_shared.schema.model_card import ModelCard
from calotype_worker.models.base import Watch
from calotype_worker.models.opaque.whole_pipeline import WholePipeline, own_generators, samplers_of, sizes_of
from calotype_worker.request import Generated, GenerationRequest, Mesh
from calotype_worker.sampling.samplers import Sampler

# diffusers renders 20 views in batches of 4096 rays and drops what is left over: 20 · side² must be a multiple.
_SIDE_MULTIPLE = 32
_SIDES = (64, 128, 256)  # pixels; the pipeline's own default first
_CHANNELS = ("R", "G", "B")


class ShapE(WholePipeline):
    """An `OpaqueModel` around a diffusers `ShapEPipeline`.

    The denoising is batched; surface and turntable are then made one object after the other, so sizes need not be
    shared. `mesh_grid` is the number of points on a side of the grid that the surface is found on, `ray_samples` the
    coarse and fine points on a ray. The renderer stays in float32: its position encoding multiplies by up to 2^14.
    """

    # The one that the model was made with; its own config (sample prediction, clipping) is kept as it is.
    samplers: ClassVar[Mapping[Any, Sampler]] = {SamplerType.HEUN: Sampler(scheduler=HeunDiscreteScheduler)}

    @classmethod
    def card_of(cls, name: str, pipeline: Any, notes: Mapping[str, Any], version: str) -> ModelCard:
        native = sizes_of(notes, [(side, side) for side in _SIDES])
        return ModelCard(
            name=name,
            family="shap_e",
            version=version,
            size_multiple=_SIDE_MULTIPLE,
            native_sizes=native,
            max_pixels=max(width * height for width, height in native),
            max_prompt_tokens=int(pipeline.tokenizer.model_max_length),
            samplers=samplers_of(pipeline, cls.samplers),
            features=frozenset({Feature.TEXT_TO_3D.value}),
            output_formats=(OutputFormat.PLY.value, OutputFormat.GIF.value),
            description=str(notes.get("description", "")),
        )

    def __init__(
        self,
        pipeline: Any,
        *,
        card: ModelCard,
        device: torch.device,
        dtype: torch.dtype,
        max_batch: int = 8,
        mesh_grid: int = 128,
        ray_samples: tuple[int, int] = (64, 128),
    ) -> None:
        super().__init__(pipeline, card=card, device=device, dtype=dtype, max_batch=max_batch)
        self._renderer = pipeline.shap_e_renderer
        if dtype is not torch.float32:
            self._renderer.to(torch.float32)
        self._renderer.mesh_decoder.register_forward_hook(_refuse_empty)
        self._mesh_grid = mesh_grid
        self._ray_samples = ray_samples

    def batch_key(self, request: GenerationRequest) -> tuple[Any, ...]:
        self._check(request)
        for field, value in (("num_frames", request.num_frames), ("negative_prompt", request.negative_prompt)):
            if value:
                raise self._unable(field, value)
        if request.width != request.height:
            raise InvalidRequest(
                f"model {self.card.name!r} makes square images only, and the width is {request.width}",
                field="height",
                value=request.height,
                remedy=f"use {request.width}",
            )
        return request.num_inference_steps, request.guidance_scale if request.guided else 1.0

    def run(self, requests: Sequence[GenerationRequest], watch: Watch) -> Sequence[Generated | None]:
        """Objects, each as a mesh and as the frames (F, H, W, 3) of one turn, the first of them as the image.

        A request that will be written as PLY gets no frames, and one written as GIF no mesh.
        The mesh is also None where the object has no surface: its turntable may still show something.

        Raises:
            GenerationFailed: an object's latents are not finite.
        """
        ids = [request.request_id for request in requests]
        if watch(0).issuperset(ids):
            return [None] * len(requests)
        first = requests[0]
        pipeline = self._pipeline
        pipeline.scheduler = scheduler = self._make_scheduler(first)
        steps = len(scheduler.timesteps)
        _watch_steps(scheduler, ids, watch)
        try:
            latents = pipeline(  # (B, embeddings, features)
                prompt=[request.prompt for request in requests],
                generator=own_generators(requests),
                num_inference_steps=first.num_inference_steps,
                guidance_scale=first.guidance_scale,
                output_type="latent",
            ).images
        except _AllCancelled:
            return [None] * len(requests)
        made: list[Generated | None] = []
        for request, own in zip(requests, latents.float(), strict=True):
            if request.request_id in watch(steps):
                made.append(None)
                continue
            if not own.isfinite().all():
                raise GenerationFailed(
                    f"request {request.request_id!r}: its latents are not finite; use a lower guidance scale, or load "
                    "the model in bfloat16 or float32"
                )
            # Rendering the views takes most of the time: only where they are wanted.
            mesh = None if request.output_format is OutputFormat.GIF else self._mesh(own[None])
            frames = None if request.output_format is OutputFormat.PLY else self._turntable(own[None], request.width)
            made.append(
                Generated(
                    request_id=request.request_id,
                    image=_drawn(mesh, request.width) if frames is None else frames[0],
                    frames=frames,
                    mesh=mesh,
                    seed=request.seed,
                    steps_taken=steps,
                    model=request.model,
                )
            )
        return made

    def _turntable(self, latents: torch.Tensor, side: int) -> np.ndarray:
        """Views around the upright (z) axis of latents (1, embeddings, features): uint8 (19, side, side, 3)."""
        coarse, fine = self._ray_samples
        # The renderer seeds torch's global generator for every batch of rays: leave it to others as it was.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            views = self._renderer.decode_to_image(
                latents, self.device, size=side, n_coarse_samples=coarse, n_fine_samples=fine
            )  # (20, side, side, 3) in 0..1
        turn = views[:-1]  # the last view is the first again, which would make a loop stutter
        return turn.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()

    def _mesh(self, latents: torch.Tensor) -> Mesh | None:
        """The surface of latents (1, embeddings, features) in the cube from -1 to 1, z up; None if there is none."""
        try:
            surface = self._renderer.decode_to_mesh(latents, self.device, grid_size=self._mesh_grid)
        except _EmptyMesh:
            return None
        linear = torch.stack([surface.vertex_channels[channel] for channel in _CHANNELS], dim=1)  # (V, 3)
        return Mesh(
            vertices=surface.verts.float().cpu().numpy(),
            faces=surface.faces.long().cpu().numpy(),
            colors=_srgb(linear).clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy(),
        )


class _AllCancelled(Exception):
    """Ends a run from within the pipeline, which has no callback to end it with."""


class _EmptyMesh(Exception):
    """The decoder found no surface; the renderer would go on to color it and fail."""


def _watch_steps(scheduler: Any, ids: Sequence[str], watch: Watch) -> None:
    """Have a run's own scheduler tell `watch` of each step, and raise `_AllCancelled` once all are."""
    step, done = scheduler.step, 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = step(*args, **kwargs)
        done += 1
        if watch(done).issuperset(ids):
            raise _AllCancelled
        return result

    scheduler.step = watched


def _refuse_empty(module: torch.nn.Module, inputs: Any, surface: Any) -> None:
    if not len(surface.verts):
        raise _EmptyMesh


def _drawn(mesh: Mesh | None, side: int) -> np.ndarray:
    """A mesh's vertices seen from the front, the nearest on top: uint8 (side, side, 3)."""
    image = np.full((side, side, 3), 255, dtype=np.uint8)
    if mesh is not None:
        order = np.argsort(-mesh.vertices[:, 1])
        places = ((mesh.vertices[order][:, [2, 0]] * (-1, 1) + 1) / 2 * side).astype(int).clip(0, side - 1)
        image[places[:, 0], places[:, 1]] = mesh.colors[order]
    return image


def _srgb(linear: torch.Tensor) -> torch.Tensor:
    """Linear light to sRGB (IEC 61966-2-1), both 0..1.

    The renderer gives a mesh's colors in linear light, which programs that open a PLY would show too dark.
    """
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)
