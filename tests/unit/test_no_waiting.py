"""A step never asks its device for a number: on a GPU the host would wait there for all that it has ordered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from calotype_shared.config import SamplerType
from calotype_worker.models import StepModel
from tests.unit.test_engine import request
from tests.unit.test_lossy import batch_of

# Operators whose result, or its size, the host needs to go on; those that need it where an index is a mask; and
# methods that take a tensor to the host without any operator.
ASKING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
FETCHING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class Operators(TorchDispatchMode):
    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self._asked = asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masked = name in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
        if name in ASKING or masked:
            self._asked.append(name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self._asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FETCHING:
            self._asked.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def noting() -> Iterator[list[str]]:
    """What is asked within the block."""
    asked: list[str] = []
    with Methods(asked), Operators(asked):
        yield asked


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: bool(x[0]),
        lambda x: int(x[0]),
        lambda x: torch.where(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
    ],
)
def test_every_way_to_ask_is_noticed(ask: Callable[[torch.Tensor], object]) -> None:
    numbers = torch.ones(2)
    with noting() as asked:
        ask(numbers)
    assert asked


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m_karras", "unipc", "pndm"])
def test_no_step_waits_for_its_device(tiny_step_model: StepModel, sampler: str) -> None:
    """Guided and unguided, at different steps, while one after the other finishes and leaves."""
    wanted = [
        request(f"r{steps}", steps=steps, guidance=guidance, sampler=SamplerType(sampler))
        for steps, guidance in ((3, 1.0), (5, 4.0), (6, 7.5))
    ]
    with torch.inference_mode():
        batch = batch_of(tiny_step_model, wanted)
        finished = 0
        with noting() as asked:
            while batch.slots:
                finished += len(batch.step().finished)
    assert finished == 3
    assert asked == []
