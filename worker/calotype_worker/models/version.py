"""The version of a model's weights: a hash of the files that were loaded, remembered by path, size and time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

_REMEMBERED = 4096  # files


def version_of(root: Path, files: Iterable[Path]) -> str:
    """Identifies these files by their names below `root` and their contents."""
    known = _read()
    digest = hashlib.sha256()
    for file in sorted(files):
        path = file.resolve()
        status = path.stat()
        key = f"{path} {status.st_size} {status.st_mtime_ns}"
        if key not in known:
            with path.open("rb") as opened:
                known[key] = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(file.relative_to(root).as_posix().encode())
        digest.update(bytes.fromhex(known[key]))
    _write(known)
    return f"sha256:{digest.hexdigest()[:16]}"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calotype" / "hashes.json"


def _read() -> dict[str, str]:
    try:
        found = json.loads(_cache().read_text())
        return {str(key): bytes.fromhex(value).hex() for key, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError):
        return {}  # a new machine, or one without a home: hashed again


def _write(known: dict[str, str]) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        cache = _cache()
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
            json.dump(dict(list(known.items())[-_REMEMBERED:]), file)
        Path(file.name).replace(cache)
