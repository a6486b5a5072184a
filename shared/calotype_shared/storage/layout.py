"""Where an image is in the bucket: `{job}/{attempt}-{token}/{index}.png` and, beside it, `….json` with its provenance.

Attempts never share a key, so a late upload by a worker that lost its job does no harm: the job's record names the
winning attempt's keys, and only those are a job's images. Uploaded images are `uploads/{sha256}.png` (`images.py`),
until `calotype gc` finds them unused and old. Batches have `batches/{id}/`, files that came in by HTTP
`files/{tenant}/`.
"""

from __future__ import annotations

from calotype_shared.schema.enums import OutputFormat


def attempt_folder(job_id: str, attempt: int, token: str) -> str:
    return f"{job_id}/{attempt}-{token}"


def image_key(folder: str, index: int, output_format: OutputFormat) -> str:
    return f"{folder}/{index}.{output_format.value}"


def sidecar_key(folder: str, index: int) -> str:
    return f"{folder}/{index}.json"


def sidecar_of(key: str) -> str:
    """The provenance beside an image."""
    return f"{key.rpartition('.')[0]}.json"
