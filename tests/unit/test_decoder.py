"""Finished latents wait for company only while it is about to come."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from calotype_worker.engine import Engine
from calotype_worker.engine.decoder import Decoder, Finished
from calotype_worker.engine.memory_limit import MemoryLimit
from calotype_worker.engine.trace import NoopTracer
from calotype_worker.models import StepModel
from calotype_worker.models.pool import ModelPool
from tests.unit.test_engine import request

NOBODY = math.inf


class Line:
    """A decoder of the tiny model, and when the next latent is to come."""

    def __init__(self, model: StepModel, *, batch: int = 3, max_wait_steps: int = 4) -> None:
        self._shape = model.latent_shape(64, 64)
        self._model = model.card.name
        self.next_in = NOBODY
        self._decoder = Decoder(
            ModelPool([model]),
            batch=batch,
            max_wait_steps=max_wait_steps,
            limits=lambda _, most: MemoryLimit(most, on_lower=lambda *_: None),
            steps_until_next=lambda *_: self.next_in,
        )

    def finish(self, *names: str) -> None:
        for name in names:
            latents = torch.randn(self._shape, generator=torch.Generator().manual_seed(1))
            self._decoder.add(Finished(request_id=name, model=self._model, latents=latents))

    def turn(self, *, flush: bool = False) -> list[str]:
        with torch.inference_mode():
            found = self._decoder.run(flush=flush)
        assert all(isinstance(image, np.ndarray) and image.shape == (64, 64, 3) for _, image in found)
        return [name for name, _ in found]


@pytest.fixture
def line(tiny_step_model: StepModel) -> Line:
    return Line(tiny_step_model)


def test_with_nobody_on_the_way_there_is_nothing_to_wait_for(line: Line) -> None:
    line.finish("a")
    assert line.turn() == ["a"]


@pytest.mark.parametrize("away", [1, 4])
def test_company_that_comes_in_time_is_waited_for(line: Line, away: int) -> None:
    line.finish("a")
    for steps in range(away, 0, -1):
        line.next_in = steps
        assert line.turn() == []
    line.finish("b")
    line.next_in = 50
    assert line.turn() == ["a", "b"]


def test_company_that_would_come_too_late_is_not(line: Line) -> None:
    line.finish("a")
    line.next_in = 5
    assert line.turn() == ["a"]


def test_nobody_waits_for_longer_than_the_patience(line: Line) -> None:
    """Not even where someone who is always about to come never does: its group has no turn."""
    line.finish("a")
    line.next_in = 1
    assert [line.turn() for _ in range(5)] == [[], [], [], [], ["a"]]


def test_a_full_batch_goes_at_once_and_all_go_when_nothing_else_runs(line: Line) -> None:
    line.next_in = 1
    line.finish("a", "b", "c", "d")
    assert line.turn() == ["a", "b", "c"]
    assert line.turn(flush=True) == ["d"]


class Spans(NoopTracer):
    """What the engine's thread did, in order, and how many requests each step finished."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        if track == "engine" and name != "idle":
            self.seen.append((name.split(maxsplit=1)[0], facts.get("finished", 0)))


def test_a_short_request_is_not_held_up_by_a_long_one(make_engine: Any) -> None:
    """The engine knows who is how far: the image is made before the other takes another step."""
    engine: Engine = make_engine(trace=(spans := Spans()))
    long = engine.submit(request("long", steps=150, guidance=1.0))
    short = engine.submit(request("short", steps=3, guidance=1.0))
    assert short.result(120).image.any()
    assert not long.done()
    assert spans.seen[spans.seen.index(("step", 1)) + 1][0] == "decode"
    assert long.result(120).image.any()
