"""`Telemetry`: spans of OpenTelemetry from a request to its upload, where a collector is named; else nothing at all.

A span's `traceparent` (W3C Trace Context) travels in the job's record, so that the worker's spans join the trace of
whoever submitted. No span holds a prompt, or anything else of a config but the model's name and sizes.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

from calotype_shared.errors import SettingsError

if TYPE_CHECKING:
    from calotype_shared.settings import Settings

log = logging.getLogger(__name__)

Kind = Literal["server", "producer", "consumer", "internal"]
Attribute = str | int | float | bool

_REMEDY = "run: pip install 'calotype[telemetry]'"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Span(Protocol):
    """One piece of work. As a context manager it is the current one, and ends with the block."""

    @property
    def traceparent(self) -> str | None:
        """What to hand on to others; None where nothing is traced."""
        ...

    def rename(self, name: str) -> None: ...

    def set(self, **attributes: Attribute) -> None:
        """A name with a dot is of OpenTelemetry's conventions; all others are ours."""
        ...

    def fail(self, problem: str) -> None:
        """It did not go well; `problem` is a kind or a code, as an error's words may quote what was asked for."""
        ...

    def child(self, name: str, **attributes: Attribute) -> AbstractContextManager[object]:
        """A part of it that takes as long as the block."""
        ...

    def note(self, name: str, began: float, ended: float, **attributes: Attribute) -> None:
        """A part of it that is over; seconds since the epoch."""
        ...

    def end(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Telemetry(Protocol):
    """Where spans begin. For any thread; never raises, never waits but in `close`."""

    def begin(self, name: str, *, kind: Kind, parent: str | None = None, **attributes: Attribute) -> Span:
        """A span in the trace of `parent`, a `traceparent`; without one, of the current span, or in a new trace."""
        ...

    def close(self) -> None:
        """Send what waits, for a moment."""
        ...


class NoopSpan:
    """The span of work that nobody traces."""

    traceparent: str | None = None

    def rename(self, name: str) -> None:
        return

    def set(self, **attributes: Attribute) -> None:
        return

    def fail(self, problem: str) -> None:
        return

    def child(self, name: str, **attributes: Attribute) -> AbstractContextManager[object]:
        return _NO_BLOCK

    def note(self, name: str, began: float, ended: float, **attributes: Attribute) -> None:
        return

    def end(self) -> None:
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class NoopTelemetry:
    """Traces nothing."""

    def begin(self, name: str, *, kind: Kind, parent: str | None = None, **attributes: Attribute) -> Span:
        return NOOP_SPAN

    def close(self) -> None:
        return


_NO_BLOCK: AbstractContextManager[object] = nullcontext()
NOOP_SPAN: Span = NoopSpan()
NOOP_TELEMETRY: Telemetry = NoopTelemetry()


def make_telemetry(settings: Settings, *, service: str) -> Telemetry:
    """What `CALOTYPE_TELEMETRY` asks for. OpenTelemetry is imported here, and only if it is wanted.

    Raises:
        SettingsError: it is `on`, and its packages are missing.
    """
    if settings.telemetry == "off" or (settings.telemetry == "auto" and not _is_wanted(os.environ)):
        return NOOP_TELEMETRY
    try:
        from calotype_shared.observability.otlp import Otlp  # noqa: PLC0415 - an extra, and a third of a second to import
    except ImportError as error:
        if settings.telemetry == "on":
            raise SettingsError(f"CALOTYPE_TELEMETRY='on': {error.name} is missing; {_REMEDY}") from None
        log.warning("nothing is traced", extra={"reason": f"{error.name} is missing", "remedy": _REMEDY})
        return NOOP_TELEMETRY
    return Otlp(service=service)


def _is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's own variables name a collector, or this very application is traced already."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if any(environment.get(name) for name in _ENDPOINTS):
        return True
    api, sdk = sys.modules.get("opentelemetry.trace"), sys.modules.get("opentelemetry.sdk.trace")
    return api is not None and sdk is not None and isinstance(api.get_tracer_provider(), sdk.TracerProvider)


def trace_id_of(traceparent: str | None) -> str | None:
    """32 hexadecimal digits; None where it is none that can be read."""
    found = _TRACEPARENT.fullmatch(traceparent or "")
    return found[1] if found else None
