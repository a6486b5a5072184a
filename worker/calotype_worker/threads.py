"""Configures how the threads of one operator wait for each other on a CPU. Call it before the first import of torch.

In GNU's OpenMP, threads that wait at a barrier spin for a long time, expecting the others soon. If another process uses
one of the cores, they wait in vain, and a step with several hundred barriers takes many times longer. Measured on two
cores, a forward pass of 31 rows, alone and beside three busy processes: 121 and 1,120 ms with the default of 300,000
spins, 116 and 600 ms with 10,000, 131 and 418 ms with 3,000, 191 and 437 ms with 100.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_own = threading.local()
_SPINS = "10000"  # the fewest that cost nothing on an idle machine
_CHOSEN_BY_OTHERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make waiting threads sleep soon, unless the environment configures how they wait."""
    if not any(name in environment for name in _CHOSEN_BY_OTHERS):
        environment["GOMP_SPINCOUNT"] = _SPINS


def compute_alone() -> None:
    """Make this thread compute without helper threads from now on. Cheap to call again.

    OpenMP keeps helper threads for each thread that has ever computed in parallel. If a process has more of them than
    cores, all waiting threads sleep instead of spinning. In a worker whose forty threads prepare requests, this
    increased the time of a step of 24 rows from 80 to 120 ms, and of one of two rows from 18 to 46 ms.
    """
    if not getattr(_own, "alone", False):
        compute_with(1)
        _own.alone = True


@contextmanager
def alone_meanwhile() -> Iterator[None]:
    """`compute_alone` within the block, in a thread of other code."""
    import torch  # noqa: PLC0415

    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute_with(threads: int) -> None:
    """Set how many threads this thread's operators use, independently of other threads."""
    import torch  # noqa: PLC0415 - this module is imported before it

    torch.get_num_threads()  # a thread's first call adopts the number set last by any thread, so do it now
    torch.set_num_threads(threads)


def apart(work: Callable[[], T]) -> T:
    """Run `work` in a new thread that ends afterwards, together with its OpenMP threads. Returns or raises the same."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="calotype-apart")
    thread.start()
    thread.join()
    return outcome.result()
