"""`profile_models`: times whole steps of unguided requests, as the loop runs them, to find each model's knee."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine.admission import Admission
from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.engine.profile import Profile, measure
from calotype_worker.engine.request_state import prepare
from calotype_worker.engine.row_budget import RowBudgets
from calotype_worker.engine.step_batch import StepBatch
from calotype_worker.models.base import StepModel
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pool import ModelPool
from calotype_worker.request import GenerationRequest, GroupKey
from calotype_worker.sampling.table import TableCache

log = logging.getLogger(__name__)

MakeBatch = Callable[[StepModel, GroupKey, MemoryLimit], StepBatch]


def profile_models(
    models: ModelPool,
    budgets: RowBudgets,
    *,
    seconds: float,
    sizes: Callable[[int], Sequence[int]],
    tables: TableCache,
    admission: Admission,
    make_batch: MakeBatch,
) -> None:
    """Give `budgets` the profiles of each model's native sizes, trying `sizes(most)` rows, in `seconds` overall.

    Runs in the engine's thread, so that PyTorch's helper threads of that thread are the ones measured.
    """
    found = [models.get(name) for name in models.names]
    steppable = [model for model in found if not isinstance(model, PipelineModel)]
    share = seconds / max(1, sum(len(model.card.native_sizes) for model in steppable))

    def profile_one(model: StepModel, width: int, height: int) -> tuple[tuple[int, int], Profile]:
        shape = model.latent_shape(width, height)
        group = GroupKey(model=model.card.name, latent_shape=shape)

        def make_step(rows: int) -> Callable[[], object]:
            states = [prepare(_request(model, width, height, number), models, tables) for number in range(rows)]
            for error in admission.admit(model, [state.stages[0] for state in states]):
                if error is not None:
                    raise error
            batch = make_batch(model, states[0].group, MemoryLimit(rows, on_lower=lambda *_: None))
            batch.join([state.row for state in states])
            return batch.step

        points = measure(sizes(budgets.max(group)), make_step, seconds=share, device=model.device)
        shared = model.device.type == "cpu"
        profile = Profile(model=model.card.name, width=width, height=height, points=points, shared=shared)
        if profile.disturbed:
            log.warning(
                "profile disturbed: the processor is used by other processes",
                extra={"model": profile.model, "rows": points[-1].rows},
            )
        return shape[1:], profile

    for model in steppable:
        models.use(model.card.name)
        budgets.set_profiles(model.card.name, [profile_one(model, *size) for size in model.card.native_sizes])


def _request(model: StepModel, width: int, height: int, number: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"profile-{number}",
        prompt="",
        width=width,
        height=height,
        num_inference_steps=50,
        guidance_scale=1.0,
        seed=number,
        sampler=SamplerType(model.card.samplers[0]),
        model=model.card.name,
    )
