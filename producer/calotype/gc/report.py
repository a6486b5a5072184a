"""`Report`: what a collection has found, by kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """Kinds of objects in a bucket and in Redis' indexes."""

    IMAGES = "images"  # of jobs, with their provenance
    UPLOADS = "uploads"
    INCOMING = "incoming"  # put there by a link and never completed
    FILES = "files"  # uploaded over HTTP
    BATCHES = "batches"  # manifests, plans, parts and results
    UNFINISHED = "unfinished"  # objects of several parts that were never completed
    INDEX = "index"  # entries in Redis whose records are gone
    FOREIGN = "foreign"  # not Calotype's: never removed


@dataclass
class KindCount:
    """Objects of one kind: removed (in a dry run: to be removed), too young to decide, and kept."""

    removed: int = 0
    removed_bytes: int = 0
    young: int = 0
    kept: int = 0


@dataclass(kw_only=True)
class Report:
    """Owned by the one thread that collects."""

    dry_run: bool
    by_kind: dict[Kind, KindCount] = field(default_factory=lambda: {kind: KindCount() for kind in Kind})
    seconds: float = 0.0

    def __getitem__(self, kind: Kind) -> KindCount:
        return self.by_kind[kind]

    @property
    def removed(self) -> int:
        return sum(count.removed for count in self.by_kind.values())

    @property
    def removed_bytes(self) -> int:
        return sum(count.removed_bytes for count in self.by_kind.values())

    def json(self) -> dict[str, Any]:
        kinds = {kind.value: vars(count) for kind, count in self.by_kind.items()}
        return {
            "dry_run": self.dry_run,
            "removed": self.removed,
            "removed_bytes": self.removed_bytes,
            "seconds": round(self.seconds, 3),
            "by_kind": kinds,
        }
