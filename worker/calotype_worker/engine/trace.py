"""`Tracer`: receives the engine's spans, for a trace file, for metrics, or for nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Tracer(Protocol):
    """Receives spans."""

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        """Record that `name` happened on `track` from `began` to `ended`, both `time.monotonic()`. Never blocks."""
        ...

    def wait(self, name: str, identity: str, began: float, ended: float) -> None:
        """The same for waits, which may overlap."""
        ...


class NoopTracer:
    """Discards all spans."""

    def span(self, track: str, name: str, began: float, ended: float, **facts: Any) -> None:
        return

    def wait(self, name: str, identity: str, began: float, ended: float) -> None:
        return


class Tracers:
    """Passes spans on to several tracers. One that raises is logged and removed; callers are not affected."""

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
