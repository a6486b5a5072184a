"""Log format: an event, then `key=value` pairs; or one JSON object per line. Prompts and secrets are never logged."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_DECORATION = {"color_message"}  # uvicorn's copy of the message for terminals
# Libraries log warnings only: their lower levels can contain signed addresses and request bodies.
_OURS = ("calotype", "calotype_worker", "calotype_train", "calotype_shared")

_about: ContextVar[Mapping[str, str]] = ContextVar("about", default=MappingProxyType({}))


@contextmanager
def about(**known: str | None) -> Iterator[None]:
    """Adds fields such as `job_id` and `trace_id` to every line that this thread or task logs within the block."""
    token = _about.set({**_about.get(), **{name: value for name, value in known.items() if value}})
    try:
        yield
    finally:
        _about.reset(token)


# Control characters, and those that change the direction of what follows.
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(text: str) -> str:
    """One line that cannot control a terminal: what comes from a request is in it."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "backslashreplace").decode(), text)


class _Formatter(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        extra = {n: value for n, value in vars(record).items() if n not in _STANDARD and n not in _DECORATION}
        extra |= {name: value for name, value in _about.get().items() if name not in extra}
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._as_json:
            fields = {"time": when, "level": record.levelname.lower(), "event": record.getMessage(), **extra}
            return json.dumps(fields | ({"trace": trace} if trace else {}), default=str)
        pairs = "".join(f" {name}={value}" for name, value in extra.items())
        line = _escaped(f"{when} {record.levelname.lower():7} {record.getMessage()}{pairs}")
        return line + "".join(f"\n{_escaped(part)}" for part in trace.splitlines())


def set_up_logging(*, log_format: str, level: str) -> None:
    """Log to standard error; libraries only from level warning up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json=log_format == "json"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
