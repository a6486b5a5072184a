"""The engine's promises beside right images: faults stay alone, cancel frees rows, bits can be fixed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.errors import GenerationFailed, InvalidRequest
from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import EngineSettings, GenerationRequest
from calotype_worker.engine.failure_isolation import run_isolating_failures
from calotype_worker.models import ModelPool, StepModel
from calotype_worker.models.base import Conditioning, Rows, Text


def request(name: str, *, steps: int = 6, guidance: float = 4.0, **changes: Any) -> GenerationRequest:
    values = {
        "request_id": name,
        "prompt": name,
        "width": 64,
        "height": 64,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": 1,
        "sampler": SamplerType.EULER_A,
    }
    return GenerationRequest(**{**values, **changes})


class Faulty:
    """The tiny model with one prompt that makes its forward pass, or its encoder, raise or give NaN."""

    def __init__(self, model: StepModel, *, fault: str) -> None:
        self._model = model
        self._fault = fault
        self._bad: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, texts: Sequence[Text]) -> Sequence[Conditioning]:
        if self._fault == "encode" and "bad" in [text.prompt for text in texts]:
            raise RuntimeError("no words for this")
        found = self._model.encode(texts)
        self._bad += [own["text"] for text, own in zip(texts, found, strict=True) if text.prompt == "bad"]
        return found

    def predict(self, rows: Rows) -> torch.Tensor:
        bad = [i for i, row in enumerate(rows.conditioning["text"]) if any(torch.equal(row, b) for b in self._bad)]
        if self._fault == "predict" and bad:
            raise RuntimeError("this row is too much")
        output = self._model.predict(rows)
        if self._fault == "nan":
            output[bad] = float("nan")
        return output


@pytest.mark.parametrize(
    ("fault", "said"),
    [("encode", "no words for this"), ("predict", "this row is too much"), ("nan", "not finite")],
    ids=["encode", "predict", "nan"],
)
def test_a_bad_row_fails_alone(make_engine: Any, tiny_step_model: StepModel, fault: str, said: str) -> None:
    """Its neighbours in the same step batch come out as if it had never been there."""
    good = [request(f"good {i}", seed=i) for i in range(4)]
    alone = [make_engine().submit(r).result(timeout=120).image for r in good]
    engine = make_engine(Faulty(tiny_step_model, fault=fault), start=False)
    engine.start()
    futures = [engine.submit(r) for r in (*good[:2], request("bad"), *good[2:])]
    with pytest.raises(GenerationFailed, match=said):
        futures.pop(2).result(timeout=120)
    for future, expected in zip(futures, alone, strict=True):
        assert np.abs(future.result(timeout=120).image.astype(int) - expected.astype(int)).max() <= 1
    assert engine.stats().failed == 1
    assert engine.alive


def test_out_of_memory_splits_the_batch(make_engine: Any, tiny_step_model: StepModel) -> None:
    """A step batch too large for the device goes through in parts; no request that fits alone fails."""

    class Small(Faulty):
        def predict(self, rows: Rows) -> torch.Tensor:
            if len(rows.latents) > 4:
                raise torch.OutOfMemoryError("tried to allocate more than there is")
            return self._model.predict(rows)

    engine = make_engine(Small(tiny_step_model, fault=""))
    futures = [engine.submit(request(f"r{i}")) for i in range(8)]
    assert all(future.result(timeout=120).image.shape == (64, 64, 3) for future in futures)
    assert engine.stats().failed == 0
    assert engine.stats().out_of_memory > 0, "they never were too many"


def test_cancel_frees_the_rows_within_a_step(make_engine: Any) -> None:
    """A waiting request takes the place of a cancelled one at once, whatever was left of it."""
    engine = make_engine(max_rows=2)
    long = engine.submit(request("long", steps=900, sampler=SamplerType.DDIM))
    waiting = engine.submit(request("next", steps=2))
    while (engine.progress("long") or (0, 0))[0] == 0:
        time.sleep(0.001)
    assert engine.cancel("long")
    done = engine.stats().forward_passes
    assert waiting.result(timeout=120).steps_taken == 2
    assert engine.stats().forward_passes <= done + 1 + 2
    with pytest.raises(CancelledError):
        long.result(timeout=1)
    assert not engine.cancel("long")
    assert engine.progress("long") is None


def test_a_cancelled_future_frees_its_rows_too(make_engine: Any) -> None:
    """Whoever holds only the future can stop the work with it."""
    engine = make_engine(max_rows=2)
    long = engine.submit(request("long", steps=900, sampler=SamplerType.DDIM))
    assert long.cancel()
    assert engine.submit(request("next", steps=2)).result(timeout=120)
    assert engine.stats().cancelled == 1


def test_guidance_of_one_costs_one_row(make_engine: Any) -> None:
    """Half the work, and the same rule as diffusers: only above 1 is there an unconditional row."""
    engine = make_engine()
    engine.submit(request("plain", steps=5, guidance=1.0)).result(timeout=120)
    assert engine.stats().rows == 5
    engine.submit(request("guided", steps=5, guidance=1.1)).result(timeout=120)
    assert engine.stats().rows == 15


def test_deterministic_mode_gives_the_same_bits_in_any_company(make_engine: Any) -> None:
    """Over arrival orders and neighbours; without it the last bits may differ with the number of rows."""
    wanted = [request(f"p{i}", seed=i, steps=5 + i, sampler=list(SamplerType)[i]) for i in range(6)]
    runs = []
    for order in (wanted, wanted[::-1], wanted[2:3], wanted[3:] + wanted[:3]):
        engine = make_engine(max_rows=9, deterministic=True)
        futures = {r.request_id: engine.submit(r) for r in order}
        runs.append({name: future.result(timeout=120).image for name, future in futures.items()})
        engine.stop()
    for run in runs[1:]:
        for name, image in run.items():
            assert np.array_equal(image, runs[0][name])


def test_what_the_model_cannot_do_is_refused_at_submit(make_engine: Any) -> None:
    """In the caller's thread, with the field and the remedy, before anything is queued."""
    engine = make_engine()
    with pytest.raises(InvalidRequest, match=r"width=60.*use 56 or 64"):
        engine.submit(request("a", width=60))
    with pytest.raises(InvalidRequest, match="pixels"):
        engine.submit(request("a", width=1024, height=1024))
    with pytest.raises(InvalidRequest, match=r"prompt=.*windows"):
        engine.submit(request("a", prompt="x" * 400))
    with pytest.raises(InvalidRequest, match=r"negative_prompt=.*windows"):
        engine.submit(request("a", negative_prompt="x" * 400))
    with pytest.raises(InvalidRequest, match=r"loras='lora': .* does not support this"):
        engine.submit(request("a", loras=(("neon", 1.0),)))
    source = np.zeros((32, 64, 3), dtype=np.uint8)
    with pytest.raises(InvalidRequest, match=r"init_image=.*has 64x32 pixels, and the request 64x64"):
        engine.submit(request("a", init_image=source))
    first = engine.submit(request("a"))
    with pytest.raises(InvalidRequest, match="already in the engine"):
        engine.submit(request("a"))
    first.result(timeout=120)
    assert engine.stats().in_flight == 0


def test_a_refiner_is_asked_too(make_engine: Any, tiny_step_model: StepModel) -> None:
    """By its own card: here it has the size, but not the sampler that the first model begins with."""
    second = Faulty(tiny_step_model, fault="")
    second.card = tiny_step_model.card.model_copy(update={"name": "second", "samplers": ("ddim",)})  # type: ignore[attr-defined]
    engine = make_engine(ModelPool([tiny_step_model, second]))
    with pytest.raises(
        InvalidRequest, match=r"sampler='euler_a': is not available for model 'second'; available: ddim"
    ):
        engine.submit(request("a", refiner="second"))
    assert engine.submit(request("b", refiner="second", sampler=SamplerType.DDIM)).result(timeout=30).steps_taken == 6


def test_stop_finishes_what_fits_and_cancels_the_rest(make_engine: Any) -> None:
    """Nobody waits for ever on a future of an engine that is gone."""
    engine = make_engine(max_rows=4)
    short, long = engine.submit(request("short", steps=2)), engine.submit(request("long", steps=900))
    engine.stop(drain_seconds=1.0)
    assert short.result(timeout=1).steps_taken == 2
    assert long.cancelled()
    with pytest.raises(GenerationFailed, match="not running"):
        engine.submit(request("late"))


def test_a_lost_device_ends_every_request_and_is_reported(make_engine: Any, tiny_step_model: StepModel) -> None:
    """The worker must leave, so that others can take its jobs over."""

    class Lost(Faulty):
        def predict(self, rows: Rows) -> torch.Tensor:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    reported: list[BaseException] = []
    engine = make_engine(Lost(tiny_step_model, fault=""), on_fatal=reported.append)
    future = engine.submit(request("r"))
    with pytest.raises(GenerationFailed, match="the engine stopped"):
        future.result(timeout=120)
    engine._thread.join(120)
    [reason] = reported
    assert "illegal memory access" in str(reason)
    assert not engine.alive


def test_settings_that_cannot_work_are_refused() -> None:
    """A guided request needs two rows; fewer would never be admitted."""
    with pytest.raises(InvalidRequest, match="max_rows=1"):
        EngineSettings(max_rows=1)


def test_splitting_finds_exactly_the_bad_items() -> None:
    """And asks about every other item only in company, not one by one."""
    calls = []

    def run(items: Sequence[int]) -> list[int]:
        calls.append(len(items))
        if 13 in items:
            raise ValueError("unlucky")
        return [item * 2 for item in items]

    results = run_isolating_failures(list(range(32)), run)
    assert [r for r in results if not isinstance(r, Exception)] == [2 * i for i in range(32) if i != 13]
    assert isinstance(results[13], ValueError)
    assert len(calls) < 14
