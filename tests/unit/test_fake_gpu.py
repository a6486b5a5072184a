"""What a GPU would refuse, or make the host wait for: the engine on a pretended device (`tests/fake_gpu.py`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine, Generated, GenerationRequest
from calotype_worker.models import Memory, ModelPool, StepModel, load_model, registry
from calotype_worker.sampling.samplers import SAMPLERS
from calotype_worker.sampling.table import TableCache
from tests.fake_gpu import GPU, DeviceTensor, pretended_gpu
from tests.unit.stub_models import Shelf, batch_of, wanted
from tests.unit.test_engine import request
from tests.unit.test_engine_golden import TOLERANCE, levels


class DeviceEngine(Engine):
    """Its thread sees the GPU, and so do those that submit: they bring LoRAs there."""

    def _main(self) -> None:
        with pretended_gpu():
            super()._main()

    def submit(self, request: GenerationRequest) -> Future[Generated]:
        with pretended_gpu():
            return super().submit(request)


class Shop:
    """The same tiny models here and there."""

    def __init__(self, folder: Path) -> None:
        self._shelf = Shelf(folder)

    def near(self, family: str) -> StepModel:
        return self._shelf.model(family)

    @functools.cache  # noqa: B019 - one shop a run
    def expected(self, family: str) -> list[np.ndarray]:
        """The CPU's images of `varied(family)`."""
        return [made.image for made in make(Engine, self.near(family), varied(family))]

    def on_device(self, family: str, name: str = "", **options: Any) -> StepModel:
        adapters = self._shelf.adapters if family == "sd" else None
        source = str(self._shelf.source(family))
        # What an operator makes in inference mode, as the engine calls it, is no view of what was made outside.
        with torch.inference_mode(), pretended_gpu():
            model = load_model(
                name or family, source=source, adapters=adapters, device=GPU.type, **{"dtype": "float32", **options}
            )
        assert isinstance(model, StepModel)
        return model


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_device", torch.device)  # which refuses all but cpu and cuda
        yield Shop(tmp_path_factory.mktemp("on_device"))


def make(
    kind: type[Engine],
    models: StepModel | ModelPool,
    requests: Sequence[GenerationRequest],
    *,
    tables: TableCache | None = None,
) -> list[Generated]:
    engine = kind(models, tables=tables)
    engine.start()
    try:
        return [future.result(120) for future in [engine.submit(each) for each in requests]]
    finally:
        engine.stop()


def varied(family: str) -> list[GenerationRequest]:
    """All that the family can do, by several samplers where it has them."""
    kinds = (SamplerType.EULER_A, SamplerType.DPMPP_2M_KARRAS, SamplerType.DDIM, SamplerType.UNIPC, SamplerType.LCM)
    flow = family in ("sd3", "flux")
    return [
        replace(each, sampler=SamplerType.EULER if flow else kinds[index % len(kinds)])
        for index, each in enumerate(wanted(family))
    ]


# ---- the pretence itself


def test_devices_do_not_mix() -> None:
    here = torch.randn(3, 4)
    with pretended_gpu() as gpu:
        there = here.to(GPU)
        assert isinstance(there, DeviceTensor)
        assert there.device == GPU
        with pytest.raises(RuntimeError, match="two devices"):
            there + here
        with pytest.raises(RuntimeError, match="two devices"):
            torch.cat([there, here])
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert gpu.waits == []
        assert torch.equal((there * torch.tensor(2.0) + torch.ones(4, device=GPU)).cpu(), here * 2 + 1)
        layer = torch.nn.Linear(4, 2)
        expected = layer(here)
        assert torch.equal(layer.to(GPU)(there).cpu(), expected)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float16),
        lambda x: torch.zeros(2).copy_(x),
        lambda x: bool(x[0]),
        lambda x: int(x[0]),
        lambda x: torch.where(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
    ],
)
def test_every_way_to_wait_is_noted(ask: Callable[[torch.Tensor], object]) -> None:
    with pretended_gpu() as gpu:
        numbers = torch.ones(2, device=GPU)
        assert gpu.waits == []
        ask(numbers)
        assert gpu.waits


# ---- the engine on it


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_images_are_those_of_the_cpu(shop: Shop, family: str) -> None:
    """Guided and not, previews, from an image, inpainted, with a LoRA, a ControlNet and a long prompt: one batch."""
    made = make(DeviceEngine, shop.on_device(family), varied(family))
    for here, there in zip(shop.expected(family), made, strict=True):
        assert levels(here, there.image) <= TOLERANCE, there.request_id


@pytest.mark.parametrize(
    "options", [{"memory": Memory(offload="model")}, {"dtype": "bfloat16"}], ids=["offload", "bfloat16"]
)
def test_other_ways_to_hold_a_model(shop: Shop, options: dict[str, Any]) -> None:
    """Parts that come and go, and a network of half the precision, whose images are roughly the same."""
    made = make(DeviceEngine, shop.on_device("sd", **options), varied("sd"))
    for here, there in zip(shop.expected("sd"), made, strict=True):
        assert np.abs(here.astype(int) - there.image.astype(int)).mean() < 4, there.request_id


def test_models_that_take_turns_on_the_device(shop: Shop) -> None:
    models = [shop.on_device("sd", name) for name in ("a", "b")]
    with torch.inference_mode(), pretended_gpu():
        pool = ModelPool(models, memory_budget=models[0].weight_bytes + 1)
    requests = [request(str(index), model="ab"[index % 2]) for index in range(4)]
    expected = make(Engine, shop.near("sd"), [replace(each, model="sd") for each in requests])
    made = make(DeviceEngine, pool, requests)
    assert pool.moves
    for here, there in zip(expected, made, strict=True):
        assert levels(here.image, there.image) <= TOLERANCE


def test_latents_of_another_model_and_fresh_ones_join_together(shop: Shop) -> None:
    """A refiner's come from the device, fresh ones from main memory."""
    model = shop.on_device("sd")
    requests = [request("fresh", steps=2), request("handed over", steps=2)]
    with torch.inference_mode(), pretended_gpu():
        batch = batch_of(model, requests)
        members = list(batch.members)
        batch.leave(members)
        assert members[1].latents is not None
        members[1].latents = members[1].latents.to(GPU)
        batch.join(members)
        assert len(batch.step().failed) == 0


def test_no_step_waits_for_the_device(shop: Shop) -> None:
    """From joining to the last one's end. Only previews are fetched, and what is finished, to be looked at."""
    model = shop.on_device("sd")
    with torch.inference_mode(), pretended_gpu() as gpu:
        batch = batch_of(model, [replace(each, preview_every=0) for each in varied("sd")])
        assert {len(row.conditioning["text"]) for row in batch.members} > {24}, "no text was longer than others"
        assert any(row.controls for row in batch.members)
        gpu.waits.clear()
        finished = 0
        while batch.members:
            report = batch.step()
            assert not report.failed
            finished += len(report.finished)
    assert finished == len(varied("sd"))
    assert gpu.waits == []


class NoTables(TableCache):
    """As if no sampler were linear."""

    def get(self, *_: Any) -> None:
        return None


def test_samplers_without_a_table_step_there(shop: Shop) -> None:
    """Scheduler objects keep their own numbers here."""
    requests = [
        request(sampler.value, sampler=sampler)
        for sampler in list(SAMPLERS)[:12]
        if sampler.value in shop.near("sd").card.samplers
    ]
    assert len(requests) > 8
    expected = make(Engine, shop.near("sd"), requests)
    made = make(DeviceEngine, shop.on_device("sd"), requests, tables=NoTables())
    for here, there in zip(expected, made, strict=True):
        assert levels(here.image, there.image) <= TOLERANCE, here.request_id
