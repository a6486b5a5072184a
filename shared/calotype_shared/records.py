"""How a job's record is written in Redis: a hash of strings. Reads it back as a `JobRecord`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from calotype_shared.errors import CalotypeError
from calotype_shared.jobs import JobRecord

SCHEMA = 1
_TIMES = ("created_at", "queued_at", "started_at", "finished_at")  # microseconds of the server's clock
_JSON = ("config", "error", "images", "timings", "metadata")


class UnreadableRecord(CalotypeError):
    """A record that this version cannot read: written by a newer one, or damaged."""

    code = "unreadable_record"


def read_record(job_id: str, fields: Mapping[str, str]) -> JobRecord:
    """The record of a job from its hash.

    Raises:
        UnreadableRecord: a newer schema, or fields that make no sense.
    """
    schema = fields.get("schema", "?")
    if schema != str(SCHEMA):
        raise UnreadableRecord(
            f"job {job_id}: its record has schema {schema!r}, this version reads {SCHEMA}; upgrade this process"
        )
    try:
        values: dict[str, Any] = {name: json.loads(fields[name]) for name in _JSON if fields.get(name)}
        values |= {name: int(fields[name]) / 1e6 for name in _TIMES if name in fields}
        plain = ("state", "lane", "digest", "attempt", "failures", "max_failures", "worker", "step", "total_steps")
        values |= {name: fields[name] for name in plain if name in fields}
        return JobRecord.model_validate({"id": job_id, **values})
    except (ValueError, ValidationError) as error:
        raise UnreadableRecord(f"job {job_id}: its record is damaged ({error}); cancel or delete it") from error
