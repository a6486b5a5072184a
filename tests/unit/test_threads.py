"""A worker's own threads do not wait busily for each other, unless its operator wants them to."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from calotype_shared.errors import InvalidRequest
from calotype_worker.engine import engine
from calotype_worker.engine.request_state import prepare
from calotype_worker.threads import apart, compute_alone, compute_with, wait_briefly
from tests.unit.test_engine import request


def test_waiting_threads_sleep_soon() -> None:
    """OpenMP reads the variable when torch is imported."""
    environment: dict[str, str] = {}
    wait_briefly(environment)
    assert environment == {"GOMP_SPINCOUNT": "10000"}


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}, {"KMP_BLOCKTIME": "0"}])
def test_what_the_operator_chose_stays(chosen: dict[str, str]) -> None:
    """Whatever OpenMP they have."""
    environment = dict(chosen)
    wait_briefly(environment)
    assert environment == chosen


def test_threads_that_compute_alone_leave_the_others_their_helpers() -> None:
    """A thread's own choice: the engine's thread keeps the number that it began with."""
    found: dict[str, int] = {}
    chosen, said = threading.Event(), threading.Event()

    def engine() -> None:
        compute_with(2)
        chosen.set()
        said.wait(120)
        torch.ones(8).sum()
        found["engine"] = torch.get_num_threads()

    def job() -> None:
        chosen.wait(120)
        compute_alone()
        compute_alone()
        found["job"] = torch.get_num_threads()
        said.set()

    before = torch.get_num_threads()
    threads = [threading.Thread(target=engine), threading.Thread(target=job)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    apart(lambda: torch.set_num_threads(before))
    assert found == {"engine": 2, "job": 1}
    assert torch.get_num_threads() == before


def test_a_request_is_prepared_without_helpers(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread of whoever submits it, which has as many as before afterwards, whatever came of it."""
    seen = []

    def preparing(*arguments: Any, **options: Any) -> Any:
        seen.append(torch.get_num_threads())
        return prepare(*arguments, **options)

    monkeypatch.setattr(engine, "prepare", preparing)
    made = make_engine()

    def submit() -> int:
        torch.set_num_threads(2)
        made.submit(request("good")).result(120)
        with pytest.raises(InvalidRequest, match="width=12"):
            made.submit(request("bad", width=12))
        return torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        assert apart(submit) == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]


def test_apart_hands_on_what_came_of_it() -> None:
    """A result or an error, from a thread that is over."""
    running = threading.active_count()
    assert apart(lambda: threading.current_thread().name) == "calotype-apart"
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)
    assert threading.active_count() == running
