"""`calotype top`: a live view of queues, workers and the rows of their step batches in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from calotype.cli.jobs import AsJson
from calotype.cli.output import clock_time, plain, print_json
from calotype.client import Client
from calotype.overview import Overview, WorkerView
from calotype_shared.errors import ServiceUnavailable
from calotype_shared.schema.enums import JobState, Lane
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.schema.worker_info import StepGroup, StepRow

_BAR = 30  # characters
_PROMPT = 34
_FAILURES = 5
_FULL, _EMPTY = "━", "╌"


@dataclass(frozen=True, kw_only=True)
class Look:
    """The state at one moment. The rate covers the time since the previous one."""

    overview: Overview
    failures: Sequence[JobRecord]
    images_a_second: float | None = None

    def as_json(self) -> dict[str, Any]:
        failures = [
            {
                "id": record.id,
                "finished_at": record.finished_at,
                "error": record.error.model_dump() if record.error else None,
            }
            for record in self.failures
        ]
        return {
            **self.overview.model_dump(mode="json"),
            "images_a_second": self.images_a_second,
            "failures": failures,
        }


def top(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print the state once and exit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch queues, workers and every row of their step batches. With --json, print one line per update."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with Client() as client:
        looks = _looks(client, interval)
        first = next(looks)  # an error on the first read ends the command
        if once:
            print_json(first.as_json()) if as_json else console.print(render(first))
            return
        with suppress(KeyboardInterrupt):  # the way out
            if as_json:
                print_json(first.as_json())
                for look in looks:
                    print_json(look.as_json())
            with Live(render(first), console=console, screen=console.is_terminal, auto_refresh=False) as live:
                _show(client, interval, looks, live)


def _show(client: Client, interval: float, looks: Iterator[Look], live: Live) -> None:
    while True:
        try:
            for look in looks:
                live.update(render(look), refresh=True)
        except ServiceUnavailable as error:
            live.update(Text(plain(f"{error}\n\nretrying; Ctrl-C ends"), style="bold"), refresh=True)
            time.sleep(interval)
            looks = _looks(client, interval)


def _looks(client: Client, interval: float) -> Iterator[Look]:
    before: Overview | None = None
    while True:
        now = client.overview()
        yield Look(overview=now, failures=client.dead_jobs.list(limit=_FAILURES), images_a_second=_rate(before, now))
        before = now
        time.sleep(interval)


def _rate(before: Overview | None, now: Overview) -> float | None:
    """Images per second of the workers that were alive at both times."""
    if before is None or now.at <= before.at:
        return None
    made = {worker.name: worker.images for worker in before.workers}
    return sum(worker.images - made.get(worker.name, worker.images) for worker in now.workers) / (now.at - before.at)


def render(look: Look) -> RenderableType:
    """All parts, the most important first: what does not fit into the window is cut off at the bottom."""
    parts: list[RenderableType] = [_summary(look), Text()]
    if not look.overview.workers:
        parts.append(Text("no worker is running; start one with: calotype worker --model demo", style="bold"))
    for worker in look.overview.workers:
        parts += [_worker_line(worker), *(_group(group) for group in worker.groups), Text()]
    parts += [_queues(look.overview), Text()]
    if look.failures:
        parts.append(_failures(look.failures))
    return Group(*parts)


def _summary(look: Look) -> Text:
    overview = look.overview
    running = sum(group.running for worker in overview.workers for group in worker.groups)
    text = Text.assemble((time.strftime("%H:%M:%S", time.localtime(overview.at)), "bold"))
    for lane in Lane:
        lines = [line for line in overview.queues if line.lane is lane]
        oldest = max((line.oldest_wait_seconds or 0.0 for line in lines), default=0.0)
        waiting = sum(line.waiting for line in lines)
        text.append(f"  {lane.value} {waiting}" + (f", oldest {_seconds(oldest)}" if waiting else ""))
    text.append(f"  in step batches {running}")
    if look.images_a_second is not None:
        text.append(f"  {look.images_a_second:.2f} images/s", "bold")
    if overview.jobs_a_second is not None:
        text.append(f"  {overview.jobs_a_second:.2f} jobs/s recently")
    if overview.counts is not None:
        text.append(f"  failed {overview.counts[JobState.FAILED]}")
    return text


def _worker_line(worker: WorkerView) -> Text:
    mean = worker.rows / worker.forward_passes if worker.forward_passes else 0.0
    state = "draining" if worker.draining else "working" if worker.groups else "idle"
    facts = f"  {worker.device}  {state}  {worker.images} images  {mean:.1f} rows per step  {worker.failed} errors"
    return Text.assemble((plain(worker.name), "bold"), facts)


def _group(group: StepGroup) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1))
    for _ in range(4):
        table.add_column(no_wrap=True)
    rows = sum(2 if row.guided else 1 for row in group.rows)
    words = f"{rows}/{group.budget} rows  {group.waiting} waiting  {group.decoding} decoding"
    table.add_row(Text(f"  {group.model} {group.width}x{group.height}"), Text(words))
    for row in group.rows:
        table.add_row(_name(row), _bar(row), Text(f"{row.step}/{row.total_steps}", justify="right"), _kind(row))
    if group.running > len(group.rows):
        table.add_row(Text(f"    and {group.running - len(group.rows)} more"))
    return table


def _name(row: StepRow) -> Text:
    said = plain(" ".join((row.prompt or row.job or "a finished job").split()))
    return Text("    " + (said if len(said) <= _PROMPT else said[: _PROMPT - 1] + "…"))


def _bar(row: StepRow) -> Text:
    done = round(_BAR * row.step / row.total_steps) if row.total_steps else 0
    return Text.assemble((_FULL * done, "bold"), (_EMPTY * (_BAR - done), "dim"))


def _kind(row: StepRow) -> Text:
    return Text("guided, 2 rows" if row.guided else "plain, 1 row", "dim")


def _queues(overview: Overview) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("QUEUE", "LANE", "WAITING", "OLDEST"):
        table.add_column(column, justify="left" if column in ("QUEUE", "LANE") else "right")
    for line in overview.queues:
        oldest = "" if line.oldest_wait_seconds is None else _seconds(line.oldest_wait_seconds)
        table.add_row(plain("+".join(line.models)), line.lane.value, str(line.waiting), oldest)
    return table


def _failures(records: Sequence[JobRecord]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("DEAD", "WHEN", "WHY"):
        table.add_column(column, no_wrap=True)
    for record in records:
        why = plain(f"{record.error.code}: {record.error.message}" if record.error else "no reason was recorded")
        when = clock_time(record.finished_at) if record.finished_at else ""
        table.add_row(record.id, when, Text(why.replace("\n", " ")))
    return table


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value / 60:.0f} min"
