"""Log lines: an event verb, then `key=value` pairs; or one JSON object a line. Prompts and secrets are never logged."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_NOISY = (
    "celery",
    "kombu",
    "amqp",
    "botocore",
    "boto3",
    "urllib3",
    "diffusers",
    "transformers",
    "PIL",
    "huggingface_hub",
)


class _Formatter(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._as_json:
            fields = {"time": when, "level": record.levelname.lower(), "event": record.getMessage(), **extra}
            return json.dumps(fields | ({"trace": trace} if trace else {}), default=str)
        pairs = "".join(f" {name}={value}" for name, value in extra.items())
        return f"{when} {record.levelname.lower():7} {record.getMessage()}{pairs}" + (f"\n{trace}" if trace else "")


def set_up_logging(*, log_format: str, level: str) -> None:
    """Everything to standard error; libraries only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json=log_format == "json"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
