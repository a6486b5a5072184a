"""`Ticket`: a request's way through the engine; and `prepare`, which makes one beside the step loop."""

from __future__ import annotations

import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calotype_worker.engine.request import Generated, GenerationRequest, GroupKey
from calotype_worker.engine.step_batch import Slot
from calotype_worker.models.base import StepModel
from calotype_worker.sampling.row_scheduler import RowScheduler
from calotype_worker.sampling.samplers import make_scheduler
from calotype_worker.sampling.table import SamplerTable, TableCache


@dataclass(kw_only=True, eq=False)
class Ticket:
    """Made in the submitter's thread; from then on the engine's thread owns it. Times are `time.monotonic()`."""

    slot: Slot
    group: GroupKey
    future: Future[Generated]
    submitted: float
    admitted: float = 0.0
    encode_seconds: float = 0.0
    denoised: float = 0.0

    @property
    def id(self) -> str:
        return self.slot.request.request_id

    def generated(self, image: np.ndarray, now: float) -> Generated:
        """The finished picture, and where its time went."""
        return Generated(
            request_id=self.id,
            image=image,
            seed=self.slot.request.seed,
            steps_taken=self.slot.total_steps,
            timings={
                "wait": self.admitted - self.submitted,
                "encode": self.encode_seconds,
                "denoise": self.denoised - self.admitted - self.encode_seconds,
                "decode": now - self.denoised,
            },
        )

    def resolve(self, outcome: Generated | Exception) -> None:
        """Set the future's outcome; dropped if the caller cancelled it in the same moment."""
        try:
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        except InvalidStateError:
            return


def prepare(request: GenerationRequest, model: StepModel, tables: TableCache) -> Ticket:
    """Checks, the sampler's table and the starting noise: all that needs no device. For any thread.

    Raises:
        InvalidRequest: the model, or the sampler, cannot do this.
    """
    model.card.check_size(request.width, request.height)
    model.check_prompt("prompt", request.prompt)
    if request.guided:
        model.check_prompt("negative_prompt", request.negative_prompt)

    def scheduler() -> Any:
        return make_scheduler(request.sampler, model.scheduler_config, request.num_inference_steps)

    # The size is in the key because some families shift their noise levels with it.
    key = (request.sampler, request.num_inference_steps, request.width, request.height)
    table = tables.get(key, scheduler)
    generator = torch.Generator().manual_seed(request.seed)
    shape = model.latent_shape(request.width, request.height)
    noise = torch.randn((1, *shape), generator=generator)
    sampler: SamplerTable | RowScheduler
    if table is not None:
        sampler, total_steps, sigma = table, len(table), table.initial_sigma
    else:
        own = scheduler()
        sampler = RowScheduler(own, generator)
        total_steps, sigma = len(own.timesteps), float(own.init_noise_sigma)
    return Ticket(
        slot=Slot(
            request=request,
            generator=generator,
            latents=noise * sigma,
            sampler=sampler,
            total_steps=total_steps,
        ),
        group=GroupKey(model=model.card.name, latent_shape=shape),
        future=Future(),
        submitted=time.monotonic(),
    )
