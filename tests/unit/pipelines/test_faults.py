"""What goes wrong in one request of a pipeline stays its own; what cannot be merged is found out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from calotype_shared.errors import GenerationFailed
from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.models.pipeline.model import PipelineModel
from tests.unit.pipelines.builders import sd
from tests.unit.pipelines.driver import batch, counted, difference, four, load, run_of, together


@pytest.fixture(scope="module")
def model() -> PipelineModel:
    return load(sd.stable_diffusion())


def test_cancelled_at_any_call(model: PipelineModel) -> None:
    """A request that is cancelled at any of its network calls leaves the others as they are alone."""
    requests = four(model)
    plain = [model.plain(request) for request in requests]
    for calls in range(1, 9):
        running = batch(model)
        runs = [run_of(model, request) for request in requests]
        with torch.no_grad():
            for run in runs:
                running.join(run)
            while runs[1].calls < calls and not runs[1].ended:
                running.step()
            if not runs[1].ended:
                running.leave(runs[1])
            while running.runs:
                running.step()
        assert runs[1].ended
        for index in (0, 2, 3):
            assert difference(runs[index].result, plain[index]) <= 1e-5, calls


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
        assert difference(runs[index].result, plain[index]) <= 1e-5


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
        assert difference(runs[index].result, plain[index]) <= 1e-5


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
        assert difference(run.result, expected) <= 1e-5
    assert calls.total() == sum(request.num_inference_steps + 1 for request in requests)  # PNDM takes one more
    assert "unet" in " ".join(model.summary()["alone"])


def test_out_of_memory(model: PipelineModel) -> None:
    """Calls that do not fit into memory together run in parts that do, and the limit is remembered."""
    requests = four(model)
    plain = [model.plain(request) for request in requests]

    def tight(module: Any, args: Any) -> None:
        if args[0].shape[0] > 3:
            raise torch.OutOfMemoryError("out of memory")

    lowered: list[tuple[int, int]] = []
    limit = MemoryLimit(32, on_lower=lambda tried, current: lowered.append((tried, current)))
    hook = model.modules["unet"].register_forward_pre_hook(tight)
    try:
        running = batch(model, limit=limit)
        runs = [run_of(model, request) for request in requests]
        with torch.no_grad():
            for run in runs:
                running.join(run)
            while running.runs:
                running.step()
    finally:
        hook.remove()
    assert lowered
    for run, expected in zip(runs, plain, strict=True):
        assert difference(run.result, expected) <= 1e-5


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
