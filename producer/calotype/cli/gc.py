"""`calotype gc`: removes objects and index entries that no record refers to any more."""

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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Minimum age of what is removed, such as 7d, 12h or 90m [1h].")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Remove even if Redis seems to have lost data.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove from storage what no record refers to any more.

    That is images of expired jobs and batches, leftovers of attempts, unused uploads and files. Also remove index
    entries in Redis that point to expired records.

    Objects younger than an hour are kept, and so are uploads younger than the retention of records. Without --yes
    the command runs twice: first to show what would be removed, then, after confirmation, to remove it.
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
        raise InvalidRequest("is not a valid age", field="--older-than", value=age, remedy="write 90m, 12h or 7d")
    seconds = int(match[1]) * _UNITS[match[2]]
    if seconds < SAFE_SECONDS:
        raise InvalidRequest(
            "is too short: younger objects may belong to an upload in progress",
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
        say(f"{foreign} objects in the bucket do not belong to Calotype and were left alone")
    say(f"{report.removed} {removed.lower()}, {_size(report.removed_bytes)}, in {report.seconds:.1f} s")


def _size(size: float) -> str:
    for unit in _SIZES[:-1]:
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} {_SIZES[-1]}"
