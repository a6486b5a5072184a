"""Memory that is freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_LARGE = 2**20  # bytes


def return_large_blocks() -> None:
    """Let glibc map blocks of 1 MiB and more one by one, so that each returns to the system when it is freed.

    By default glibc soon takes them from the arena of the thread, which keeps them: a process that decodes images in
    many threads then occupies the largest image's memory once per thread. Does nothing with another C library.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
    except AttributeError:  # musl
        return
