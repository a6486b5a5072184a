"""Steps as compiled graphs: the images are the same, and what cannot be compiled goes the eager way."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import InvalidRequest
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.engine.batch_row import Layout
from calotype_worker.engine.compiled import CompiledStep, buckets_up_to
from calotype_worker.models import StepModel
from tests.unit.test_engine_golden import mixed_requests


def made_by(engine: Engine, requests: list[GenerationRequest]) -> dict[str, np.ndarray]:
    futures = {request.request_id: engine.submit(request) for request in requests}
    return {name: future.result(200).image.astype(int) for name, future in futures.items()}


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_compiled_steps_give_the_same_images(make_engine: Any, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Samplers, steps and guidance mixed, so that rows come and go, and one graph serves for any number of them.

    `eager` makes the same graph and runs it as it is; to lower it and to generate code takes up to a minute.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wanted = mixed_requests()[:10]
    eager = made_by(make_engine(), wanted)
    engine: Engine = make_engine(max_rows=8, compile="default")
    compiled = made_by(engine, wanted)
    assert max(np.abs(eager[name] - compiled[name]).max() for name in eager) <= 1
    stats = engine.stats()
    assert stats.compiled_passes >= 0.7 * stats.forward_passes  # single rows do without
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiler_that_fails_costs_nothing_but_speed(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step runs eagerly, at once and from then on."""
    calls = []

    def failing(*_: Any, **__: Any) -> Any:
        def step(*_: Any) -> Any:
            calls.append(1)
            raise RuntimeError("the compiler has met a bug")

        return step

    monkeypatch.setattr(torch, "compile", failing)
    wanted = mixed_requests()[:4]
    eager = made_by(make_engine(), wanted)
    engine: Engine = make_engine(compile="default")
    found = made_by(engine, wanted)
    assert max(np.abs(eager[name] - found[name]).max() for name in eager) <= 1
    assert len(calls) == 1
    assert engine.stats().compiled_passes == 0


class Small:
    """As much of a model as a compiled step calls, with a network that is traced in no time."""

    def __init__(self, model: StepModel, sizes: tuple[tuple[int, int], ...], *, width: int) -> None:
        self.card = model.card.model_copy(update={"native_sizes": sizes})
        self.latent_shape = model.latent_shape
        self._network = torch.nn.Sequential(torch.nn.Conv2d(4, width, 1), torch.nn.Conv2d(width, 4, 1))

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any) -> torch.Tensor:
        output: torch.Tensor = self._network(latents) * conditioning["text"].mean() + timesteps.reshape(-1, 1, 1, 1)
        return output


def unguided(rows: int) -> Layout:
    return Layout(
        source=torch.arange(rows),
        owners=list(range(rows)),
        conditioning={"text": torch.ones(rows, 2, 3)},
        lengths={},
        guided=torch.empty(0, dtype=torch.long),
        guidance=torch.empty(0, 1, 1, 1),
        unconditional=torch.arange(rows),
        scales=torch.ones(rows, 1, 1, 1),
        loras=[],
        control_images={},
    )


def step(compiled: CompiledStep, rows: int, shape: tuple[int, int, int]) -> bool:
    """Whether a step of so many rows went the compiled way."""
    layout, length = unguided(rows), shape[0] * shape[1] * shape[2]
    if not compiled.can(layout, shape):
        return False
    found = compiled(
        layout,
        shape,
        state=torch.ones(rows, 2, length),
        matrices=torch.ones(rows, 2, 4),
        input_scale=torch.ones(rows),
        timesteps=torch.ones(rows),
        noise=torch.zeros(rows, 1, length),
    )
    return found is not None


@pytest.mark.slow
def test_more_graphs_than_pytorch_makes_by_default(tiny_step_model: StepModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three networks, two sizes, a graph for each of several numbers of rows; sizes that are not native go without."""
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=lambda graph, *_, **__: graph.forward)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sizes = ((64, 64), (64, 96))
    models: list[Any] = [Small(tiny_step_model, sizes, width=width) for width in (4, 5, 6)]
    # Its own patch: pytest's would take the setting away for good.
    with torch._dynamo.config.patch(recompile_limit=8), torch.inference_mode():
        for model in models:
            compiled = CompiledStep(model, "reduce-overhead")
            for size in sizes:
                assert all(step(compiled, rows, tiny_step_model.latent_shape(*size)) for rows in (2, 4, 8, 16))
            assert not step(compiled, 4, tiny_step_model.latent_shape(96, 96))
            assert not compiled.broken
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 * 2 * 4


@pytest.mark.parametrize(
    ("rows", "buckets"), [(2, (2,)), (3, (2, 3)), (32, (2, 4, 8, 16, 32)), (24, (2, 4, 8, 16, 24)), (1000, None)]
)
def test_buckets_are_few(rows: int, buckets: tuple[int, ...] | None) -> None:
    """Each of them is compiled before the worker is ready."""
    found = buckets_up_to(rows)
    assert found == (buckets or found)
    assert len(found) <= 8
    assert found[-1] == rows
    assert list(found) == sorted(set(found))


def test_the_same_bits_and_compiled_graphs_exclude_each_other() -> None:
    """A graph's bits depend on its number of rows."""
    with pytest.raises(InvalidRequest, match=r"compile='default'.*turn off compile"):
        EngineSettings(deterministic=True, compile="default")
