"""`make_telemetry`: where a process's spans go, by `CALOTYPE_TELEMETRY` and OpenTelemetry's variables."""

from __future__ import annotations

import logging
import os

from opentelemetry import trace

from calotype_shared.errors import SettingsError
from calotype_shared.observability.tracing import TRACER_NAME, Telemetry
from calotype_shared.settings import Settings

log = logging.getLogger(__name__)

_REMEDY = "run: pip install 'calotype[telemetry]'"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def make_telemetry(settings: Settings, *, service: str) -> Telemetry:
    """The telemetry that `CALOTYPE_TELEMETRY` selects. An application that has set up OpenTelemetry keeps its setup.

    Raises:
        SettingsError: it is `on`, and the SDK's packages are missing.
    """
    if settings.telemetry == "off":
        return Telemetry()
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return Telemetry(tracer=trace.get_tracer(TRACER_NAME))
    if settings.telemetry == "auto" and not _names_a_collector():
        return Telemetry(tracer=trace.get_tracer(TRACER_NAME))  # no-op until the application sets a provider
    try:
        from calotype_shared.observability.otlp import export_spans  # noqa: PLC0415 - an extra
    except ImportError as error:
        if settings.telemetry == "on":
            raise SettingsError(f"CALOTYPE_TELEMETRY='on': {error.name} is missing; {_REMEDY}") from None
        log.warning("tracing is disabled", extra={"reason": f"{error.name} is missing", "remedy": _REMEDY})
        return Telemetry()
    return export_spans(service=service)


def _names_a_collector() -> bool:
    """Whether OpenTelemetry's own variables do."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not disabled and any(os.environ.get(name) for name in _ENDPOINTS)
