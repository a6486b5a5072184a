"""`File`: one object of a finished job, from its encoding until it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True, eq=False)
class File:
    """One object for storage; its bytes are in `data`, or wait in `path`."""

    key: str
    content_type: str
    data: bytes | None
    path: Path | None = None
    tried: bool = False  # so it may be partly stored
    stored: bool = False
