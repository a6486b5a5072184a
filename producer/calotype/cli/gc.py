"""`calotype gc`: removes what no record refers to any more."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from calotype.cli.jobs import AsJson
from calotype.cli.output import print_json, print_table, say
from calotype.gc import Collector, Kind, Report
from calotype_shared.errors import InvalidRequest
from calotype_shared.queue.connection import connect_redis
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import SAFE_SECONDS, Storage

_UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Leave what is younger, as 7d, 12h or 90m [1h].")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Although Redis seems to have lost its data.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove from storage what no record refers to any more: images of jobs and batches that have expired, leftovers
    of attempts, uploads and files that nobody uses; and from Redis what points to records that are gone.

    Nothing that is younger than an hour goes, nor an upload that is younger than records are kept. Without --yes it
    looks twice: first to say what would go, then to remove it.
    """
    settings = Settings.load()
    age = None if older_than is None else _seconds(older_than)
    with connect_redis(settings) as redis:
        collector = Collector(
            redis,
            Storage(settings),
            key_prefix=settings.key_prefix,
            bucket=settings.s3_bucket,
            retention_seconds=settings.retention_seconds,
            older_than_seconds=age,
        )
        if not (dry_run or yes):
            found = collector.run(dry_run=True)
            if found.removed:
                if not as_json:
                    _show(found)
                typer.confirm(f"remove {found.removed} objects and entries?", abort=True, err=True)
        report = collector.run(dry_run=dry_run, force=force)
    print_json(report.json()) if as_json else _show(report)


def _seconds(age: str) -> float:
    """Raises InvalidRequest."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", age)
    if match is None:
        raise InvalidRequest("is no age", field="--older-than", value=age, remedy="write 90m, 12h or 7d")
    seconds = int(match[1]) * _UNITS[match[2]]
    if seconds < SAFE_SECONDS:
        raise InvalidRequest(
            "is too young: it may be an upload in flight",
            field="--older-than",
            value=age,
            remedy=f"use at least {SAFE_SECONDS / 3600:g}h",
        )
    return seconds


def _show(report: Report) -> None:
    removed = "WOULD REMOVE" if report.dry_run else "REMOVED"
    print_table(
        ("", removed, "BYTES", "TOO YOUNG", "KEPT"),
        ((kind.value, t.removed, t.removed_bytes, t.young, t.kept) for kind, t in report.by_kind.items()),
    )
    if foreign := report[Kind.FOREIGN].kept:
        say(f"{foreign} objects in the bucket are none of Calotype's; they are left alone")
    say(f"{report.removed} {removed.lower()}, {_size(report.removed_bytes)}, in {report.seconds:.1f} s")


def _size(size: float) -> str:
    for unit in _SIZES[:-1]:
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} {_SIZES[-1]}"
