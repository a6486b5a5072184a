"""What an object does in a child process that was forked while it existed.

A child shares its parent's sockets: two processes that read from one connection get each other's answers. Locks that a
thread of the parent held stay locked for ever. So objects with connections or locks drop both in the child. (redis-py
does this by itself for its connections.)
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    def after_fork(self) -> None:
        """Called in the child, before any of its code runs. It must not use what it shares with the parent."""


_known: weakref.WeakSet[Forkable] = weakref.WeakSet()


def reset_in_children(forkable: Forkable) -> None:
    """Call its `after_fork` in every child process that is forked while it exists."""
    _known.add(forkable)


def _after_fork() -> None:
    for forkable in list(_known):
        forkable.after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)
