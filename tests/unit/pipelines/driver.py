"""Runs requests of a pipeline together without the engine, and each of them alone by plain diffusers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine.call_batch import CallBatch
from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.engine.pipeline_run import PipelineRun
from calotype_worker.models.latent import Adapters, Memory
from calotype_worker.models.pipeline.first_runs import probe_request
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pipeline.network_calls import NetworkCalls
from calotype_worker.models.pipeline.roles import Roles
from calotype_worker.models.pipeline.tree import children
from calotype_worker.request import GenerationRequest

_PROMPTS = ("a red circle", "b", "a much longer prompt", "xx yy")
_STEPS = (2, 3, 5, 2)
_GUIDANCE = (1.0, 4.0, 7.5, 2.0)


def load(
    pipeline: Any,
    *,
    name: str = "tiny",
    merging: bool = True,
    side: int | None = None,
    adapters: Adapters | None = None,
    memory: Memory | None = None,
) -> PipelineModel:
    """The pipeline as a model, on the CPU in its own precision; `side`: its native width and height in pixels."""
    pipeline.set_progress_bar_config(disable=True)
    return PipelineModel(
        pipeline,
        name=name,
        version="0",
        device=torch.device("cpu"),
        dtype=torch.float32,
        notes={} if side is None else {"native_sizes": [[side, side]]},
        merging=merging,
        adapters=adapters,
        memory=memory,
    )


def four(model: PipelineModel, **common: Any) -> list[GenerationRequest]:
    """Requests that differ in all that may differ."""
    width, height = model.card.native_sizes[0]
    made = []
    for index in range(4):
        request = probe_request(model.arguments, width, height, prompt=_PROMPTS[index], seed=index)
        made.append(
            replace(
                request,
                request_id=str(index),
                sampler=SamplerType(model.card.samplers[0]),
                num_inference_steps=_STEPS[index],
                guidance_scale=_GUIDANCE[index],
                **common,
            )
        )
    return made


def batch(model: PipelineModel, *, max_rows: int = 32, limit: MemoryLimit | None = None) -> CallBatch:
    found = limit or MemoryLimit(32, on_lower=lambda tried, current: None)
    return CallBatch(model.calls, order=model.order, max_rows=max_rows, limit=lambda place: found, split=model.split)


def run_of(model: PipelineModel, request: GenerationRequest) -> PipelineRun:
    run = PipelineRun(request.request_id, seed=request.seed, watched=model.watched(request))
    run.work = model.start(request, run.follow)
    return run


def together(model: PipelineModel, requests: Sequence[GenerationRequest], *, apart: int = 0) -> list[PipelineRun]:
    """All of them, each joining `apart` calls after the one before."""
    running = batch(model)
    runs = [run_of(model, request) for request in requests]
    with torch.no_grad():
        for run in runs:
            running.join(run)
            for _ in range(apart):
                running.step()
        while running.runs:
            running.step()
    return runs


def without_merging(model: PipelineModel, requests: Sequence[GenerationRequest]) -> list[PipelineRun]:
    calls, model.calls = model.calls, NetworkCalls(Roles(), merging=False)
    try:
        return together(model, requests)
    finally:
        model.calls = calls


@contextmanager
def counted(model: PipelineModel, component: str) -> Iterator[Counter[str]]:
    """Calls of a network."""
    found: Counter[str] = Counter()
    hook = model.modules[component].register_forward_pre_hook(lambda *_: found.update([component]))
    # A hook is a change of the network, as the model sees it.
    try:
        yield found
    finally:
        hook.remove()


def difference(left: Any, right: Any) -> float:
    """The largest difference of two results, over all their numbers."""
    if isinstance(left, torch.Tensor):
        left, right = left.float().numpy(), right.float().numpy()
    if isinstance(left, np.ndarray):
        assert left.shape == right.shape
        return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max()) if left.size else 0.0
    parts, others = children(left), children(right)
    if parts is None or others is None:
        return 0.0 if type(left) is type(right) else float("inf")
    assert [key for key, _ in parts] == [key for key, _ in others]
    return max((difference(own, other) for (_, own), (_, other) in zip(parts, others, strict=True)), default=0.0)
