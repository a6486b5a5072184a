"""Reads lines of manifests and writes lines of results, in Calotype's and in OpenAI's format.

A line in Calotype's format is a config with an optional `custom_id`:

    {"custom_id": "cover-1", "prompt": "a red circle", "num_inference_steps": 20, "seed": 7}

A line in OpenAI's format is a request whose body follows their images API (`openai_images.py`):
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from calotype.batches.record import BatchFormat
from calotype.openai_images import image_data, read_generation
from calotype.resolver import with_preset
from calotype_shared.errors import CalotypeError, InvalidRequest
from calotype_shared.schema.config import GenerationConfig

LONGEST_LINE = 2**20  # bytes
MAX_CUSTOM_ID = 512  # characters
OPENAI_URL = "/v1/images/generations"
_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: allowed in JSON, but not in UTF-8


class Request(NamedTuple):
    """One line of a manifest."""

    custom_id: str
    config: GenerationConfig  # not resolved


class Finished(NamedTuple):
    """The fields of a final job that a result contains."""

    line: int
    custom_id: str
    job_id: str
    state: str
    images: list[dict[str, Any]]
    error: dict[str, str] | None
    finished_at: float

    @property
    def good(self) -> bool:
        return self.state == "succeeded"


class LineFormat(Protocol):
    """Both ways have these two verbs. `read` raises InvalidRequest."""

    def read(self, fields: Mapping[str, Any], *, number: int) -> Request: ...

    def write(self, result: Finished, *, url: Callable[[str], str]) -> dict[str, Any]: ...


class _Native:
    def read(self, fields: Mapping[str, Any], *, number: int) -> Request:
        values = dict(fields)
        custom_id = read_custom_id(values.pop("custom_id", None), number)
        return Request(custom_id, GenerationConfig.parse(with_preset(values)))

    def write(self, result: Finished, *, url: Callable[[str], str]) -> dict[str, Any]:
        return {
            "custom_id": result.custom_id,
            "line": result.line,
            "job_id": result.job_id,
            "state": result.state,
            "images": result.images,
            "error": result.error,
        }


class _OpenAI:
    def read(self, fields: Mapping[str, Any], *, number: int) -> Request:
        for field, wanted in (("method", "POST"), ("url", OPENAI_URL)):
            if fields.get(field) != wanted:
                raise InvalidRequest(
                    "does not match this batch", field=field, value=fields.get(field), remedy=f"use {wanted!r}"
                )
        body = fields.get("body")
        if not isinstance(body, Mapping):
            raise InvalidRequest(
                "must be an object", field="body", value=body, remedy="send an object with the request's fields"
            )
        custom_id = fields.get("custom_id")
        if custom_id is None:
            raise InvalidRequest("is missing", field="custom_id", value=None, remedy="give each line a unique one")
        return Request(read_custom_id(custom_id, number), read_generation(body).config)

    def write(self, result: Finished, *, url: Callable[[str], str]) -> dict[str, Any]:
        line: dict[str, Any] = {"id": f"batch_req_{result.job_id}", "custom_id": result.custom_id}
        if result.good:
            body = {
                "created": int(result.finished_at),
                "data": [image_data(image, url=url(image["key"])) for image in result.images],
            }
            answer = {"status_code": 200, "request_id": result.job_id, "body": body}
            return {**line, "response": answer, "error": None}
        return {**line, "response": None, "error": result.error}


FORMATS: Mapping[BatchFormat, LineFormat] = {BatchFormat.NATIVE: _Native(), BatchFormat.OPENAI: _OpenAI()}


def parse_line(data: bytes) -> Mapping[str, Any]:
    """The JSON object of a line. Raises InvalidRequest."""
    if len(data) > LONGEST_LINE:
        raise InvalidRequest(
            f"is longer than {LONGEST_LINE} bytes", field="line", value=f"{len(data)} bytes", remedy="shorten it"
        )
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"is not JSON ({error})", field="line", value=data[:80], remedy="write one JSON object per line, in UTF-8"
        ) from None
    if not isinstance(fields, dict):
        raise InvalidRequest("is not an object", field="line", value=fields, remedy='write {"prompt": …}')
    return fields


def dump(line: Mapping[str, Any]) -> bytes:
    """One line of a results file."""
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    # Readers that split text into lines, as Python's splitlines() does, would break at these.
    return _LINE_BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"


def problem(error: CalotypeError) -> dict[str, str]:
    """An error as results carry it."""
    return {"code": error.code, "message": str(error)}


def read_custom_id(value: object, number: int) -> str:
    """The custom id of a line, or the default one. Raises InvalidRequest."""
    if value is None:
        return f"line-{number}"
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID or _SURROGATE.search(value):
        raise InvalidRequest(
            "is not valid", field="custom_id", value=value, remedy=f"use a string of 1 to {MAX_CUSTOM_ID} characters"
        )
    return value
