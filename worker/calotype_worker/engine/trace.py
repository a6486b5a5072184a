"""`Tracer`: where the engine reports its spans: to a trace file, to metrics, or nowhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Tracer(Protocol):
    """Where spans go."""

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        """Note that `name` happened on `track` from `began` to `ended`, both `time.monotonic()`. Never waits."""
        ...

    def wait(self, name: str, identity: str, began: float, ended: float) -> None:
        """The same for what may overlap: one of many waits."""
        ...


class NoopTracer:
    """Drops all."""

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        return

    def wait(self, name: str, identity: str, began: float, ended: float) -> None:
        return


class Tracers:
    """Passes spans on to several tracers. One that raises is logged and dropped; callers never notice."""

    def __init__(self, tracers: Sequence[Tracer]) -> None:
        self._tracers = tuple(tracers)

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        for tracer in self._tracers:
            try:
                tracer.span(track, name, began, ended, **facts)
            except Exception:
                self._drop(tracer)

    def wait(self, name: str, identity: str, began: float, ended: float) -> None:
        for tracer in self._tracers:
            try:
                tracer.wait(name, identity, began, ended)
            except Exception:
                self._drop(tracer)

    def _drop(self, tracer: Tracer) -> None:
        log.exception("a tracer raised and was dropped")
        self._tracers = tuple(other for other in self._tracers if other is not tracer)


@contextmanager
def spanning(trace: Tracer, track: str, name: str, **facts: Any) -> Iterator[None]:
    """A span around the block."""
    began = time.monotonic()
    try:
        yield
    finally:
        trace.span(track, name, began, time.monotonic(), **facts)
