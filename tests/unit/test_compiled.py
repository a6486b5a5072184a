"""Steps as compiled graphs: the pictures are the same, and what cannot be compiled goes the eager way."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import InvalidRequest
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.engine.compiled import buckets_up_to
from tests.unit.test_engine_golden import mixed_requests


def made_by(engine: Engine, requests: list[GenerationRequest]) -> dict[str, np.ndarray]:
    futures = {request.request_id: engine.submit(request) for request in requests}
    return {name: future.result(200).image.astype(int) for name, future in futures.items()}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_steps_give_the_same_pictures(make_engine: Any, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Samplers, steps and guidance mixed, so that rows come and go, and one graph serves for any number of them.

    `aot_eager` makes the same graph and runs it by PyTorch's own kernels; generating code takes a minute.
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


@pytest.mark.parametrize(
    ("rows", "buckets"), [(2, (2,)), (3, (2, 3)), (32, (2, 4, 8, 16, 32)), (24, (2, 4, 8, 16, 24)), (1000, None)]
)
def test_buckets_are_few(rows: int, buckets: tuple[int, ...] | None) -> None:
    """PyTorch gives up on a function after eight shapes."""
    found = buckets_up_to(rows)
    assert found == (buckets or found)
    assert len(found) <= 8
    assert found[-1] == rows
    assert list(found) == sorted(set(found))


def test_the_same_bits_and_compiled_graphs_exclude_each_other() -> None:
    """A graph's bits depend on its number of rows."""
    with pytest.raises(InvalidRequest, match=r"compile='default'.*leave it off"):
        EngineSettings(deterministic=True, compile="default")
