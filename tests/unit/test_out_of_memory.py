"""A device with too little memory: passes are split, the engine learns how much fits, and nobody's image changes.

`Small` is the real tiny model on a device that holds so many rows, or images to decode, and no more.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import GenerationFailed
from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Generated, GenerationRequest
from calotype_worker.engine.memory_limit import MemoryLimit, is_out_of_memory
from calotype_worker.models import StepModel
from calotype_worker.models.base import Rows
from tests.unit.test_engine import request

SAMPLERS = (SamplerType.EULER_A, SamplerType.UNIPC, SamplerType.DDPM, SamplerType.HEUN)


class Small:
    """Counts what was asked for. What is too much raises, while its pass still holds a tensor."""

    def __init__(self, model: StepModel, *, rows: int = 10**6, decoded: int = 10**6) -> None:
        self._model = model
        self.rows, self.decoded = rows, decoded
        self.tried: list[int] = []
        self.failed = 0
        self.leaked: list[weakref.ref[torch.Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _allocate(self, wanted: int, most: int) -> None:
        assert all(ref() is None for ref in self.leaked), "a failed pass still holds its memory"
        activations = torch.zeros(8)
        if wanted > most:
            self.failed += 1
            self.leaked.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def predict(self, rows: Rows) -> torch.Tensor:
        self.tried.append(len(rows.latents))
        self._allocate(len(rows.latents), self.rows)
        return self._model.predict(rows)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        self._allocate(len(latents), self.decoded)
        return self._model.decode(latents)


def batch(count: int = 12, *, steps: int = 6) -> list[GenerationRequest]:
    """Guided and not, with samplers that draw noise and look back."""
    return [
        request(f"r{i}", seed=i, sampler=SAMPLERS[i % 4], guidance=(4.0, 1.0)[i % 2], steps=steps + i % 3)
        for i in range(count)
    ]


def images(futures: Sequence[Future[Generated]]) -> list[np.ndarray]:
    return [future.result(timeout=120).image for future in futures]


def assert_alike(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize("fits", [1, 3, 7])
def test_all_succeed_with_the_same_images_and_few_passes_fail(
    make_engine: Any, tiny_step_model: StepModel, fits: int
) -> None:
    undisturbed = make_engine(start=False)
    engine = make_engine(small := Small(tiny_step_model, rows=fits), start=False, max_rows=18)
    outcomes = []
    for each in (undisturbed, engine):
        each.start()
        outcomes.append(images([each.submit(r) for r in batch()]))
    assert_alike(outcomes[1], outcomes[0])
    assert small.failed <= 5, f"it learned nothing: {small.tried}"
    assert max(small.tried[-8:]) <= fits
    assert engine.stats().out_of_memory == small.failed
    assert engine.stats().failed == 0


def test_nobody_joins_beyond_what_fits_and_the_engine_remembers(make_engine: Any, tiny_step_model: StepModel) -> None:
    """The next requests of that kind are taken a few at a time from the start; another size has its own limit."""
    engine = make_engine(small := Small(tiny_step_model, rows=4), max_rows=16)
    images([engine.submit(r) for r in batch()])
    small.tried.clear()
    small.failed = 0
    images([engine.submit(request(f"s{i}", seed=i)) for i in range(8)])
    assert small.failed == 0
    assert max(small.tried) in {2, 3, 4}
    crowd = [request(f"c{i}", seed=i, steps=300) for i in range(8)]
    futures = [engine.submit(r) for r in crowd]
    while max((engine.progress(r.request_id) or (0, 0))[0] for r in crowd) < 5:
        time.sleep(0.001)
    assert sum((engine.progress(r.request_id) or (0, 0))[0] > 0 for r in crowd) <= 2, "more joined than fit"
    assert all(engine.cancel(r.request_id) for r in crowd)
    while not all(future.cancelled() for future in futures):
        time.sleep(0.001)
    small.rows = 16
    images([engine.submit(request(f"t{i}", seed=i, width=32, height=32, steps=20)) for i in range(8)])
    assert max(small.tried) > 4


def test_more_is_tried_again_after_a_while(make_engine: Any, tiny_step_model: StepModel) -> None:
    """Memory was short for a passing reason: the limit comes back up."""
    engine = make_engine(small := Small(tiny_step_model, rows=2), max_rows=8)
    images([engine.submit(r) for r in batch(4)])
    small.rows = 8
    small.tried.clear()
    images([engine.submit(request(f"s{i}", seed=i, steps=120, guidance=1.0)) for i in range(8)])
    assert small.tried[0] <= 2
    assert max(small.tried) > small.tried[0]
    assert engine.stats().failed == 0


def test_what_does_not_fit_alone_fails_clearly_and_its_neighbours_do_not(
    make_engine: Any, tiny_step_model: StepModel
) -> None:
    """Its own size is the problem; they have another."""

    class Narrow(Small):
        def predict(self, rows: Rows) -> torch.Tensor:
            self.rows = 0 if rows.latents.shape[-1] > 8 else 10**6
            return super().predict(rows)

    width, height = 96, 64
    engine = make_engine(Narrow(tiny_step_model), start=False)
    engine.start()
    futures = [engine.submit(r) for r in (*batch(3), request("large", width=width, height=height))]
    with pytest.raises(GenerationFailed, match=r"too little memory.*96x64.*vae-tiling"):
        futures.pop().result(timeout=120)
    assert len(images(futures)) == 3
    assert engine.stats().failed == 1
    assert engine.alive


@pytest.mark.parametrize("fits", [0, 1, 3])
def test_decoding_too(make_engine: Any, tiny_step_model: StepModel, fits: int) -> None:
    engine = make_engine(small := Small(tiny_step_model, decoded=fits), decode_batch=8, max_rows=32, start=False)
    expected = make_engine(decode_batch=8, max_rows=32, start=False)
    requests = [request(f"r{i}", seed=i) for i in range(12)]
    expected.start()
    engine.start()
    wanted = images([expected.submit(r) for r in requests])
    futures = [engine.submit(r) for r in requests]
    if fits:
        assert_alike(images(futures), wanted)
        assert small.failed <= 3
        return
    for future in futures:
        with pytest.raises(GenerationFailed, match="too little memory"):
            future.result(timeout=120)
    assert engine.alive


def test_what_a_failed_pass_held_is_let_go(make_engine: Any, tiny_step_model: StepModel) -> None:
    """Before the next try, though the exceptions of those that do not fit are kept, and nobody collects cycles."""
    gc.disable()
    try:
        engine = make_engine(Small(tiny_step_model, rows=2, decoded=0), max_rows=16)
        for future in [engine.submit(r) for r in batch(8)]:
            with pytest.raises(GenerationFailed, match="too little memory"):
                future.result(timeout=120)
    finally:
        gc.enable()


def test_deterministic_parts_are_powers_of_two_and_their_bits_the_same_in_any_company(
    make_engine: Any, tiny_step_model: StepModel
) -> None:
    small = Small(tiny_step_model, rows=3)
    engine = make_engine(small, max_rows=16, deterministic=True)
    crowd = images([engine.submit(r) for r in batch(8)])
    assert set(small.tried) <= {1, 2, 4, 8, 16}
    small.tried.clear()
    alone = [engine.submit(r).result(timeout=120).image for r in batch(8)]
    assert set(small.tried) == {2}, "padding was worked on, or the limit was forgotten"
    for one, other in zip(alone, crowd, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_cpus_own_allocator() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert is_out_of_memory(raised.value)


def test_a_limit_that_is_tried_in_vain_is_tried_less_and_less() -> None:
    reported: list[tuple[int, int]] = []
    limit = MemoryLimit(8, on_lower=lambda tried, current: reported.append((tried, current)))

    def run(part: Sequence[int]) -> int:
        if len(part) > 4:
            raise torch.OutOfMemoryError
        return len(part)

    assert limit.run(range(8), run) == [4, 4]
    for _ in range(2000):
        assert sum(limit.run(range(8), run)) == 8
    assert reported[:2] == [(8, 4), (5, 4)]
    assert 3 <= len(reported) <= 6
