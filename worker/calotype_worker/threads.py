"""How the threads of one operator wait for each other on a CPU. Call it before torch is imported for the first time.

GNU's OpenMP lets threads that wait at a barrier spin for long, in the hope that the others are there by then. Where
another process has one of the cores they are not, and a step of several hundred barriers takes many times longer.
Measured on two cores, a forward pass of 31 rows, alone and beside three busy processes: 121 and 1,120 ms with the
default of 300,000 turns, 116 and 600 ms with 10,000, 131 and 418 with 3,000, 191 and 437 with 100.
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
_SPINS = "10000"  # the fewest that cost nothing on a machine of one's own
_CHOSEN_BY_OTHERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have waiting threads go to sleep soon, unless the environment says how they should wait."""
    if not any(name in environment for name in _CHOSEN_BY_OTHERS):
        environment["GOMP_SPINCOUNT"] = _SPINS


def compute_alone() -> None:
    """What this thread computes from now on, it computes without others' help. Cheap to say again.

    OpenMP keeps threads for each thread that ever computed something in parallel, and takes a process in which these
    are more than the cores for a crowded one, where everybody waits asleep. In a worker, whose forty threads prepare
    requests, a step of 24 rows took 120 ms then instead of 80, and one of two rows 46 instead of 18.
    """
    if not getattr(_own, "alone", False):
        compute_with(1)
        _own.alone = True


@contextmanager
def alone_meanwhile() -> Iterator[None]:
    """`compute_alone` for a while, in a thread that is not ours."""
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
    """How many threads this one's operators use, whatever others choose for theirs."""
    import torch  # noqa: PLC0415 - this module is imported before it

    torch.get_num_threads()  # a thread's first look takes the number that anyone chose last: have it over
    torch.set_num_threads(threads)


def apart(work: Callable[[], T]) -> T:
    """What `work` returns or raises, of a thread that ends with it, and with OpenMP's threads for it."""
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
