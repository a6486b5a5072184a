"""Streams a manifest into storage as the bytes of its lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from calotype.batches.lines import dump
from calotype.resolver import Submission
from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.config import GenerationConfig

_READ_BYTES = 2**20

Manifest = Path | Iterable[Submission]  # a JSONL file, or configs, prompts and mappings of fields


def manifest_bytes(manifest: Manifest) -> Iterator[bytes]:
    """The manifest in chunks of a few lines or a megabyte.

    Raises:
        InvalidRequest: it is not a manifest, or the file cannot be read.
    """
    if isinstance(manifest, (str, bytes, Mapping, GenerationConfig)) or not isinstance(manifest, (Path, Iterable)):
        raise InvalidRequest(
            f"{type(manifest).__name__} is not a manifest",
            field="manifest",
            value=manifest,
            remedy="give a pathlib.Path or an iterable of configs",
        )
    if isinstance(manifest, Path):
        try:
            file = manifest.open("rb")
        except OSError as error:
            raise InvalidRequest(
                f"cannot be read ({error.strerror})", field="manifest", value=str(manifest), remedy="give a JSONL file"
            ) from error
        with file:
            while data := file.read(_READ_BYTES):
                yield data
        return
    for config in manifest:
        if isinstance(config, GenerationConfig):
            yield config.canonical_json().encode() + b"\n"
        else:
            yield dump({"prompt": config} if isinstance(config, str) else config)


def with_custom_id(data: bytes, custom_id: str) -> bytes:
    """The line with its custom id; a line without one had the default for its number."""
    try:
        fields = json.loads(data)
        if isinstance(fields, dict):
            return dump({**fields, "custom_id": custom_id})
    except ValueError:
        pass
    return data + b"\n"


def whole_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file read in chunks."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest
