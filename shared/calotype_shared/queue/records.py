"""How a job's record is written in Redis: a hash of strings. Reads it back as a `JobRecord`.

A record's schema number says which processes may work on it: those that know the number. All others can read it and
see the fields that they know (docs/how-to/upgrade.md, decision 21).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from calotype_shared.errors import UnreadableRecord
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.schema.resolve import ResolvedConfig

SCHEMA = 1  # raised only if older workers could not run what a record asks for
OLDEST = 1  # the oldest schema that is still read
_TIMES = ("created_at", "queued_at", "started_at", "finished_at")  # microseconds of the server's clock
_JSON = ("config", "error", "images", "timings", "metadata", "history")
_PLAIN = (
    *(
        "state",
        "lane",
        "tenant",
        "digest",
        "attempt",
        "failures",
        "max_failures",
        "crashes",
        "worker",
        "step",
        "total_steps",
    ),
    *("leader", "batch", "custom_id", "traceparent"),
)


def read_record(job_id: str, fields: Mapping[str, str], *, schema: int = SCHEMA) -> JobRecord:
    """The record of a job from its hash. Of a record with a newer schema, only known fields are read.

    Raises:
        UnreadableRecord: the fields are invalid.
    """
    number = fields.get("schema", "")
    newer = number.isdecimal() and int(number) > schema
    try:
        values: dict[str, Any] = {name: json.loads(fields[name]) for name in _JSON if fields.get(name)}
        values |= {name: int(fields[name]) / 1e6 for name in _TIMES if name in fields}
        values |= {name: fields[name] for name in _PLAIN if name in fields}
        if newer:
            values["config"] = _understood(values["config"])
        return JobRecord.model_validate({"id": job_id, "schema_number": number, "newer": newer, **values})
    except (KeyError, ValueError) as error:
        problem, remedy = "is damaged", "cancel or delete it"
        if newer:
            problem, remedy = "cannot be read", f"this version reads up to schema {schema}: upgrade this process"
        raise UnreadableRecord(
            f"job {job_id}: its record, of schema {number!r}, {problem} ({in_short(error)}); {remedy}"
        ) from error


def in_short(error: Exception) -> str:
    """pydantic's message as one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}"


# Fields that every stored config has, each with a value that is valid here.
_REQUIRED = {"width": 8, "height": 8, "seed": 0}


def _understood(config: dict[str, Any]) -> ResolvedConfig:
    """The known fields of a newer config, for display only.

    A size or seed that is not valid here is shown as it is written.
    """
    written: dict[str, Any] = {}
    while True:
        try:
            return ResolvedConfig.model_validate(config).model_copy(update=written)
        except ValidationError as error:
            strange = {str(problem["loc"][0]) for problem in error.errors() if problem["loc"]} & config.keys()
            if not strange:
                raise
            written |= {name: config[name] for name in strange & _REQUIRED.keys()}
            config = {name: value for name, value in config.items() if name not in strange} | {
                name: _REQUIRED[name] for name in written
            }
