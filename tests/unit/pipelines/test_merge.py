"""Merging and cutting undo each other, for calls of any number, length and nesting."""

from __future__ import annotations

from typing import Any

import torch
from greenlet import getcurrent
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype_worker.models.pipeline.network_calls import NetworkCalls
from calotype_worker.models.pipeline.roles import Kind, Role, Roles
from calotype_worker.models.pipeline.stand_in import Call, CallingGreenlet
from tests.unit.pipelines.driver import difference


class Network(torch.nn.Module):
    """Each row's result depends on all of its own arguments, and on nothing of another row."""

    def __init__(self, *, mixing: bool = False) -> None:
        super().__init__()
        self.mixing = mixing
        self.calls = 0

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor | None = None,
        more: Any = None,
        scale: float = 1.0,
    ) -> Any:
        self.calls += 1
        mask = torch.ones(text.shape[:2]) if text_mask is None else text_mask.float()
        read = (text * mask[..., None]).sum(dim=1)  # (rows, width)
        result = sample + read[:, None] + timestep.reshape(-1, 1, 1) * scale
        for part in more["list"] if more else []:
            result = result + part.reshape(-1, 1, 1)
        if self.mixing:
            result = result + 0.1 * result.mean(dim=0, keepdim=True)
        return {"sample": result, "text": (text * 2, [len(sample)])} if more else (result,)


@st.composite
def calls_of_requests(draw: Any) -> list[dict[str, Any]]:
    """Arguments of two to five calls: other rows, lengths, timesteps; some without a mask, some with more arguments."""
    found = []
    more = draw(st.booleans())
    for seed in range(draw(st.integers(2, 5))):
        generator = torch.Generator().manual_seed(seed)
        rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        masked = draw(st.booleans())
        arguments: dict[str, Any] = {
            "sample": torch.randn((rows, 3, 2), generator=generator),
            "timestep": torch.tensor(float(draw(st.integers(0, 9)))),
            "text": torch.randn((rows, length, 2), generator=generator),
            "text_mask": torch.ones((rows, length)) if masked else None,
            "scale": draw(st.sampled_from([1.0, 2.0])),
        }
        if more:
            arguments["more"] = {"list": [torch.randn((rows,), generator=generator)], "unused": None}
        found.append(arguments)
    return found


def roles() -> Roles:
    known = {
        ("sample",): Role(Kind.ROWS),
        ("text",): Role(Kind.ROWS),
        ("text_mask",): Role(Kind.ROWS),
        ("more", "list", 0): Role(Kind.ROWS),
    }
    return Roles(known={("network", "__call__"): known})


def run(network: Network, found: list[dict[str, Any]], calls: NetworkCalls) -> list[Any]:
    """Each call's result, of as many merged calls as they take."""
    described = []
    for arguments in found:
        caller = CallingGreenlet(lambda: None, parent=getcurrent(), seed=0)
        call = Call(component="network", method="__call__", module=network, args=(), kwargs=arguments, caller=caller)
        described.append(calls.describe(call))
    results: dict[int, Any] = {}
    waiting = [one for one in described if one is not None]
    assert len(waiting) == len(found)
    while waiting:
        chosen = calls.mergeable(waiting[0], waiting)
        results |= {id(one): result for one, result in zip(chosen, calls.run(chosen), strict=True)}
        waiting = [one for one in waiting if id(one) not in results]
    return [results[id(one)] for one in described]


@settings(max_examples=60, deadline=None)
@given(calls_of_requests())
def test_merged_as_apart(found: list[dict[str, Any]]) -> None:
    """Each call's result is its own, at first and when all patterns are trusted; then in one call for each scale."""
    network, calls = Network(), NetworkCalls(roles())
    apart = [network(**arguments) for arguments in found]
    for _ in range(4):
        network.calls = 0
        for own, expected in zip(run(network, found, calls), apart, strict=True):
            # The count of rows is of the whole call, so that pattern is never merged.
            assert difference(own, expected) <= 1e-5
    if "more" not in found[0]:
        assert network.calls <= len({arguments["scale"] for arguments in found})


@settings(max_examples=30, deadline=None)
@given(calls_of_requests())
def test_mixing_is_found(found: list[dict[str, Any]]) -> None:
    """A network that mixes rows gives each call its own result all the same."""
    network, calls = Network(mixing=True), NetworkCalls(roles())
    apart = [network(**arguments) for arguments in found]
    for _ in range(3):
        for own, expected in zip(run(network, found, calls), apart, strict=True):
            assert difference(own, expected) <= 1e-5


def test_a_vector_for_the_networks_layers_is_shared() -> None:
    """Its length has nothing to do with the rows, although one row divides it."""
    arguments = {"sample": torch.ones(1, 3, 2), "scales": torch.ones(4), "timesteps": torch.ones(1, 2)}
    found = {path: role.kind for path, _, role in Roles().of(("network", "__call__"), arguments)}
    assert found == {("sample",): Kind.ROWS, ("scales",): Kind.SHARED, ("timesteps",): Kind.ROWS}
