"""What goes wrong in one request of a pipeline stays its own; what cannot be merged is found out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import GenerationFailed
from calotype_worker.engine.call_batch import CallBatch
from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.engine.pipeline_run import PipelineRun
from calotype_worker.models.pipeline.model import PipelineModel
from calotype_worker.models.pipeline.network_calls import alone
from calotype_worker.models.pipeline.roles import Place
from tests.unit.pipelines.builders import flux2, sd, wan
from tests.unit.pipelines.driver import batch, counted, difference, four, load, run_of, together


@pytest.fixture(scope="module")
def model() -> PipelineModel:
    return load(sd.stable_diffusion())


@pytest.mark.parametrize(
    ("build", "side"),
    [
        (sd.stable_diffusion, 64),
        pytest.param(wan.wan, 32, marks=pytest.mark.slow),
        pytest.param(flux2.flux2_klein, 64, marks=pytest.mark.slow),
    ],
)
def test_cancelled_at_any_call(build: Callable[[], Any], side: int) -> None:
    """A request for an image, a video or an edit that is cancelled at any of its network calls leaves the others."""
    model = load(build(), side=side)
    requests = four(model)[:3]
    if model.arguments.edits:
        reference = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        requests = [replace(request, images=(reference,)) for request in requests]
    alone = [run_of(model, request) for request in requests]
    for run in alone:
        finish(batch(model), [run])
    places: list[Place] = []
    while len(places) < alone[1].calls:
        running = batch(model)
        runs = [run_of(model, request) for request in requests]
        with torch.no_grad():
            for run in runs:
                running.join(run)
            while runs[1].calls <= len(places):
                running.step()
            assert runs[1].call is not None
            places.append(runs[1].call.place)
            running.leave(runs[1])
        finish(running)
        assert runs[1].ended
        for index in (0, 2):
            assert difference(runs[index].result, alone[index].result) <= 3e-5, places
    denoiser = "unet" if "unet" in model.modules else "transformer"
    assert {"text_encoder", denoiser, "vae"} <= {component for component, _ in places}


def finish(running: CallBatch, runs: Sequence[PipelineRun] = ()) -> None:
    """Until all runs of a batch have ended."""
    with torch.no_grad():
        for run in runs:
            running.join(run)
        while running.runs:
            running.step()


def test_failing_row(model: PipelineModel) -> None:
    """A request whose rows make the network fail fails alone, with the network's own error."""
    requests = four(model)
    plain = [model.plain(request) for request in requests]

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        sample = args[0] if args else kwargs["sample"]
        if (sample.abs() > 1e6).any():
            raise ValueError("a poisoned row")

    hook = model.modules["unet"].register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        running = batch(model)
        runs = [run_of(model, request) for request in requests]
        runs[3].work = with_latents(runs[3].work, 1e9)
        with torch.no_grad():
            for run in runs:
                running.join(run)
            while running.runs:
                running.step()
    finally:
        hook.remove()
    assert str(runs[3].error) == "a poisoned row"
    for index in (0, 1, 2):
        assert difference(runs[index].result, plain[index]) <= 3e-5


def with_latents(work: Any, value: float) -> Any:
    """The same run from latents that are all one value."""
    pipeline, arguments = work.args
    shape = (1, 4, arguments["height"] // 8, arguments["width"] // 8)
    return functools.partial(work.func, pipeline, {**arguments, "latents": torch.full(shape, value)}, **work.keywords)


def test_poisoned_row(model: PipelineModel) -> None:
    """A request whose numbers are not finite is refused when it is read, and the others are as alone."""
    requests = four(model)
    plain = [model.plain(request) for request in requests]
    running = batch(model)
    runs = [run_of(model, request) for request in requests]
    runs[2].work = with_latents(runs[2].work, float("nan"))
    with torch.no_grad():
        for run in runs:
            running.join(run)
        while running.runs:
            running.step()
    with pytest.raises(GenerationFailed, match="not finite"):
        model.read(runs[2].result)
    for index in (0, 1, 3):
        assert difference(runs[index].result, plain[index]) <= 3e-5


def test_mixing_network_is_not_merged() -> None:
    """A network that mixes the rows of its batch is found by the first merge, and runs alone from then on."""
    pipeline = sd.stable_diffusion()
    forward = pipeline.unet.forward

    @functools.wraps(forward)
    def mixing(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(sample - 0.1 * sample.mean(dim=0, keepdim=True), *args, **kwargs)

    pipeline.unet.forward = mixing
    model = load(pipeline)
    requests = four(model)
    plain = [model.plain(request) for request in requests]
    with counted(model, "unet") as calls:
        runs = together(model, requests)
    for run, expected in zip(runs, plain, strict=True):
        assert difference(run.result, expected) <= 3e-5
    assert calls.total() == sum(request.num_inference_steps + 1 for request in requests)  # PNDM takes one more
    assert "unet" in " ".join(model.summary()["alone"])
    said = {network.network: network for network in model.card.networks}
    assert (said["unet"].merged, said["text_encoder"].merged, said["vae"].merged) == (False, True, True)
    assert "by " in said["unet"].reason
    assert model.calls.trust.counts["unet", "refused"] >= 1


@pytest.mark.parametrize("fits", [3, 2, 1])
def test_out_of_memory(model: PipelineModel, fits: int) -> None:
    """Calls that do not fit into memory run in parts that do, guided ones even row by row; the limit is remembered."""
    requests = four(model)
    plain = [model.plain(request) for request in requests]
    tried: list[int] = []

    def tight(module: Any, args: Any) -> None:
        tried.append(args[0].shape[0])
        if args[0].shape[0] > fits:
            raise torch.OutOfMemoryError("out of memory")

    lowered: list[tuple[int, int]] = []
    limit = MemoryLimit(32, on_lower=lambda tried, current: lowered.append((tried, current)))
    free = MemoryLimit(32, on_lower=lambda tried, current: pytest.fail("only one network is short of memory"))
    hook = model.modules["unet"].register_forward_pre_hook(tight)
    try:
        running = CallBatch(
            model.calls,
            order=model.order,
            max_rows=32,
            limit=lambda place: limit if place[0] == "unet" else free,
            split=model.split,
        )
        finish(running, [run_of(model, request) for request in requests[:2]])
        runs = [run_of(model, request) for request in requests]
        before, lowered_before = len(tried), len(lowered)
        finish(running, runs)
    finally:
        hook.remove()
    for run, expected in zip(runs, plain, strict=True):
        assert run.error is None
        assert difference(run.result, expected) <= 3e-5
    assert lowered
    assert limit.current == {3: 3, 2: 1, 1: 1}[fits]  # half of what failed, or what went through: in rows
    assert len(lowered) <= lowered_before + 3, "what did not fit is tried again and again"
    assert max(tried[before:]) <= 7  # rows; seven of them are three guided requests and an unguided one


def test_rows_that_depend_on_each_other_are_not_split() -> None:
    """Two rows of one request that see each other: merging requests is right, but splitting a request is not."""
    pipeline = sd.stable_diffusion()
    forward = pipeline.unet.forward

    @functools.wraps(forward)
    def pairing(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[0] % 2 == 0:
            pairs = sample.reshape(-1, 2, *sample.shape[1:])
            sample = (pairs - 0.1 * pairs.flip(1)).reshape(sample.shape)
        return forward(sample, *args, **kwargs)

    pipeline.unet.forward = pairing
    model = load(pipeline)
    run = run_of(model, four(model)[1])
    with torch.no_grad():
        run.begin()
        while run.call is not None and run.call.component != "unet":
            run.resume(alone(run.call))
    assert run.call is not None
    described = model.calls.describe(run.call)
    assert described is not None
    assert described.rows == 2
    assert model.calls.cuts(described) is not None
    assert not model.split.can(described)
    run.cancel()


def test_own_random_numbers(model: PipelineModel) -> None:
    """A pipeline that draws from PyTorch's global generator draws as it would alone, and leaves it as it was."""
    requests = four(model)
    before = torch.get_rng_state()
    drawn: list[list[float]] = [[], []]

    def start(index: int) -> Any:
        work = model.start(requests[index], lambda scheduler: None)

        def drawing() -> Any:
            drawn[index].append(float(torch.rand(())))
            result = work()
            drawn[index].append(float(torch.rand(())))
            return result

        return drawing

    running = batch(model)
    runs = [run_of(model, requests[index]) for index in (0, 1)]
    with torch.no_grad():
        for index, run in enumerate(runs):
            run.work = start(index)
            running.join(run)
        while running.runs:
            running.step()
    assert torch.equal(torch.get_rng_state(), before)
    for index in (0, 1):
        generator = torch.Generator().manual_seed(requests[index].seed)
        assert drawn[index] == [float(torch.rand((), generator=generator)) for _ in range(2)]


def test_changed_networks_are_no_one_elses() -> None:
    """Attention processors that a pipeline replaces while it runs serve its own calls only, also after a cancel."""
    from diffusers import StableDiffusionPAGPipeline

    parts = sd.stable_diffusion()
    pipeline = StableDiffusionPAGPipeline(**parts.components, pag_applied_layers=["up_blocks.0"])
    model = load(pipeline)
    assert model.changes
    assert model.summary()["merged"] is False
    assert {(network.merged, network.reason) for network in model.card.networks} == {
        (False, f"each run changes {model.changes}")
    }
    requests = four(model)
    plain = [model.plain(request) for request in requests]
    running = batch(model)
    runs = [run_of(model, request) for request in requests]
    unet: Any = model.modules["unet"]
    processors = dict(unet.attn_processors)
    with torch.no_grad():
        for run in runs:
            running.join(run)
        for _ in range(12):
            running.step()
        running.leave(runs[1])
        while running.runs:
            running.step()
    for index in (0, 2, 3):
        assert difference(runs[index].result, plain[index]) == 0.0
    assert model.modules["unet"].attn_processors == processors
