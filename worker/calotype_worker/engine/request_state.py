"""`RequestState`: the state of a request in the engine; and `prepare`, which creates it outside the step loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np
import torch

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.resolve import check, check_refiner
from calotype_worker.engine.batch_row import BatchRow
from calotype_worker.models.base import StepModel, Text
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pipeline.outputs import Output
from calotype_worker.models.pool import ModelPool
from calotype_worker.request import Generated, GenerationRequest, GroupKey
from calotype_worker.sampling.row_scheduler import RowScheduler
from calotype_worker.sampling.table import SamplerTable, TableCache
from calotype_worker.sampling.trajectory import Trajectory


@dataclass(kw_only=True, eq=False)
class Source:
    """An image to start from. All noise it needs is drawn beforehand, in the order of diffusers' pipelines."""

    encoding: torch.Tensor | None  # (1, C, h, w) for the autoencoder's sample; None: the image is not used
    noise: torch.Tensor  # (1, C, h, w)
    masked_encoding: torch.Tensor | None = None  # the same for the masked image
    noising: torch.Tensor  # (N + 1, 2), see `probe_noising`


@dataclass(kw_only=True, eq=False)
class Stage:
    """One model's part of the work. Most requests have one, those with a refiner two."""

    group: GroupKey
    row: BatchRow
    texts: tuple[Text, ...]  # the prompt, and for guided requests the negative one
    source: Source | None = None


@dataclass(kw_only=True, eq=False)
class RequestState:
    """Created in the submitter's thread, then owned by the engine's thread. Times are `time.monotonic()`."""

    request: GenerationRequest
    group: GroupKey
    rows: int
    stages: list[Stage]  # the current one first; none for a pipeline
    total_steps: int
    future: Future[Generated] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    encode_seconds: float = 0.0
    denoised: float = 0.0
    accelerations: tuple[str, ...] = ()
    steps_before: int = 0  # evaluations of earlier stages, or of a pipeline's run so far

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def row(self) -> BatchRow:
        return self.stages[0].row

    @property
    def steps_done(self) -> int:
        return self.steps_before + (self.stages[0].row.step if self.stages else 0)

    def next_stage(self, latents: torch.Tensor) -> bool:
        """Pass unfinished latents (C, h, w) to the next model; False if there is none, so they are finished."""
        if len(self.stages) < 2:
            return False
        self.steps_before += self.stages.pop(0).row.total_steps
        self.row.latents = latents.unsqueeze(0)
        self.group, self.rows = self.stages[0].group, self.row.rows
        return True

    def generated(self, image: np.ndarray, now: float) -> Generated:
        """The finished image and its timings."""
        return Generated(
            request_id=self.id,
            image=_with_kept_pixels(self.request, image),
            seed=self.request.seed,
            steps_taken=self.total_steps,
            model=self.request.model,
            accelerations=self.accelerations,
            timings={
                "wait": self.admitted - self.submitted,
                "encode": self.encode_seconds,
                "denoise": self.denoised - self.admitted - self.encode_seconds,
                "decode": now - self.denoised,
            },
        )

    def made(self, output: Output, now: float) -> Generated:
        """A pipeline's outputs and their timings."""
        return Generated(
            request_id=self.id,
            image=output.shown(self.request.width, self.request.height),
            frames=output.frames,
            mesh=output.mesh,
            audio=output.audio,
            fps=self.request.fps,
            seed=self.request.seed,
            steps_taken=self.total_steps,
            model=self.request.model,
            timings={"wait": self.admitted - self.submitted, "denoise": now - self.admitted},
        )

    def resolve(self, outcome: Generated | Exception) -> None:
        """Set the future's outcome; ignored if the caller has just cancelled it."""
        try:
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        except InvalidStateError:
            return


def prepare(request: GenerationRequest, pool: ModelPool, tables: TableCache, *, exact: bool = False) -> RequestState:
    """Checks, sampler tables and starting noise: everything that needs no device. Thread-safe.

    `exact` groups requests so that none can change the bits of another.

    Raises:
        InvalidRequest: the model or the sampler does not support this.
    """
    model = pool.get(request.model)
    check(request, model.card)
    if isinstance(model, PipelineModel):
        model.check(request)
        return RequestState(
            request=request,
            group=GroupKey(model=model.card.name, latent_shape=model.group(request)),
            rows=1,
            stages=[],
            total_steps=request.num_inference_steps,
        )
    _check_pixels(request)
    refiner = pool.steppable(request.refiner) if request.refiner else None
    if refiner is not None:
        check_refiner(request, refiner.card)
    generator = torch.Generator().manual_seed(request.seed)
    cut = None if refiner is None else Trajectory.stopping_early
    stages = [_stage(request, model, tables, generator, cut=cut, first=True, exact=exact)]
    if refiner is not None:
        stages.append(_stage(request, refiner, tables, generator, cut=Trajectory.taking_over, first=False, exact=exact))
        if not all(stage.row.total_steps for stage in stages):
            raise InvalidRequest(
                f"leaves no step for {'the refiner' if stages[0].row.total_steps else 'the base model'}",
                field="refiner.start",
                value=request.refiner_start,
                remedy="use a start closer to 0.5, or more steps",
            )
        if stages[0].group.latent_shape != stages[1].group.latent_shape:
            raise InvalidRequest(
                f"its latents have shape {stages[1].group.latent_shape}, and those of {model.card.name!r} "
                f"{stages[0].group.latent_shape}",
                field="refiner",
                value=request.refiner,
                remedy="use a refiner made for that model",
            )
    for stage in stages:
        if isinstance(stage.row.sampler, RowScheduler):
            break  # it draws while stepping, from the same generator, so later noise must not be drawn earlier
        stage.row.draw_ahead(stage.group.step_shape)
    return RequestState(
        request=request,
        group=stages[0].group,
        rows=stages[0].row.rows,
        stages=stages,
        total_steps=sum(stage.row.total_steps for stage in stages),
        accelerations=tuple(
            dict.fromkeys(name for own in (model, refiner) if own for name in own.accelerations.used_for(request))
        ),
    )


def _stage(
    request: GenerationRequest,
    model: StepModel,
    tables: TableCache,
    generator: torch.Generator,
    *,
    cut: Callable[[Trajectory, float], Trajectory] | None,
    first: bool,
    exact: bool,
) -> Stage:
    """One model's part. `cut` shortens the trajectory to its side of the refiner's start."""
    strength = request.strength if request.init_image is not None and first else 1.0

    def trajectory() -> Trajectory:
        made = Trajectory.whole(model.make_scheduler(request))
        if strength < 1.0:
            made = made.starting_late(strength, request.num_inference_steps)
        return made if cut is None else cut(made, request.refiner_start)

    # The size is in the key because some families shift their noise levels with it.
    part = (strength, cut.__name__, request.refiner_start) if cut is not None else strength
    size = (request.width, request.height)
    key = (request.sampler, request.num_inference_steps, *size, part, model.card.name)
    table = tables.get(key, trajectory)
    sampler: SamplerTable | RowScheduler
    if table is not None:
        sampler, total_steps, sigma = table, len(table), table.initial_sigma
    else:
        own = trajectory()
        sampler = RowScheduler(own, generator)
        total_steps, sigma = len(own.timesteps), float(getattr(own.scheduler, "init_noise_sigma", 1.0))
    guided = request.guided and not model.embedded_guidance
    row = BatchRow(request=request, generator=generator, sampler=sampler, total_steps=total_steps, guided=guided)
    shape = model.latent_shape(*size)
    source = None
    if first:
        source = _source(request, model, generator, lambda: tables.noising(key, trajectory))
        if source is None:
            row.latents = torch.randn((1, *shape), generator=generator) * sigma
        elif request.strength >= 1.0:
            row.latents = source.noise * sigma
    texts = _texts(request, model, guided=guided, first=first)
    return Stage(
        group=GroupKey(model=model.card.name, latent_shape=shape, windows=texts[0].windows if exact else 0),
        row=row,
        texts=texts,
        source=source,
    )


def _source(
    request: GenerationRequest,
    model: StepModel,
    generator: torch.Generator,
    noising: Callable[[], torch.Tensor],
) -> Source | None:
    """The source image's noise. At full strength without a mask the image is ignored: this is text-to-image."""
    if request.init_image is None or (request.mask is None and request.strength >= 1.0):
        return None

    shape = (1, *model.latent_shape(request.width, request.height))

    def draw() -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # A network that sees the masked image as input needs the whole one only to start from.
    encoding = draw() if request.strength < 1.0 or not model.mask_channels else None
    noise = draw()
    return Source(
        encoding=encoding,
        noise=noise,
        masked_encoding=draw() if request.mask is not None else None,
        noising=noising(),
    )


def _texts(request: GenerationRequest, model: StepModel, *, guided: bool, first: bool) -> tuple[Text, ...]:
    """The texts to encode; both prompts are padded to the same number of windows."""
    names = [name for name, _ in request.loras] if first else []
    touching = model.text_loras(names)
    loras = tuple(pair for pair in request.loras if pair[0] in touching) if first else ()
    windows = model.text_windows("prompt", request.prompt)
    if guided:
        windows = max(windows, model.text_windows("negative_prompt", request.negative_prompt))
    prompt = Text(prompt=request.prompt, loras=loras, windows=windows)
    negative = Text(prompt=request.negative_prompt, negative=True, loras=loras, windows=windows)
    return (prompt, negative) if guided else (prompt,)


def _check_pixels(request: GenerationRequest) -> None:
    """Refuse images that were not fitted to the request's size."""
    images = {"init_image": request.init_image, "mask": request.mask}
    images |= {f"controls.{control.name}": control.image for control in request.controls}
    for name, image in images.items():
        if image is not None and image.shape[:2] != (request.height, request.width):
            raise InvalidRequest(
                f"has {image.shape[1]}x{image.shape[0]} pixels, and the request {request.width}x{request.height}",
                field=name,
                value=image.shape,
                remedy="resize it to the request's size first",
            )


def _with_kept_pixels(request: GenerationRequest, image: np.ndarray) -> np.ndarray:
    """Inpainting restores the source's pixels where the mask keeps them: the autoencoder would blur them."""
    if request.mask is None or request.init_image is None:
        return image
    return np.where(request.mask[:, :, None], image, request.init_image)
