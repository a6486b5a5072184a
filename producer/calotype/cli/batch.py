"""The commands about batches: `calotype batch submit`, `status`, `list`, `results`, `cancel` and more."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from calotype.batches.client import BatchHandle
from calotype.batches.dispatcher import Dispatcher
from calotype.batches.options import WINDOW, BatchOptions
from calotype.batches.record import BatchRecord, BatchState
from calotype.cli.exit_codes import ExitCode
from calotype.cli.jobs import AsJson
from calotype.cli.output import clock_time, print_json, print_table, say
from calotype.client import Client
from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.enums import Lane

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Submit and manage many jobs from one file.")

BatchId = Annotated[str, typer.Argument(metavar="ID")]
Wait = Annotated[bool, typer.Option("--wait", help="Run a dispatcher in this process and wait for the batch to end.")]


@app.command()
def submit(  # noqa: PLR0917 - the command's options; Typer passes them by name
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A JSON lines file with one config per line.")
    ],
    lane: Annotated[Lane, typer.Option(help="Priority; interactive jobs go first.")] = Lane.BULK,
    window: Annotated[int, typer.Option(help="Maximum number of its jobs in the queue at one time.")] = WINDOW,
    expires_in: Annotated[float | None, typer.Option(help="Seconds after which unfinished lines expire.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, stored with the batch; may be repeated.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Submitting again with the same key returns the same batch.")
    ] = None,
    webhook_url: Annotated[str | None, typer.Option(help="URL that is called when the batch ends.")] = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Submit a file of up to a million lines and print the batch's id."""
    options: BatchOptions = {
        "lane": lane,
        "window": window,
        "expires_in": expires_in,
        "metadata": dict(_pair(entry) for entry in metadata or ()),
        "webhook_url": webhook_url,
    }
    with Client() as client:
        batch = client.batches.submit(file, idempotency_key=idempotency_key, **options)
        _report(client, batch, wait=wait, as_json=as_json)


@app.command()
def status(
    batch_id: BatchId,
    watch: Annotated[bool, typer.Option("--watch", help="Show changes until the batch ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a batch. With --watch the exit status says how it ended."""
    with Client() as client:
        record = _watch(client.batches.follow(batch_id), as_json=as_json) if watch else client.batches.status(batch_id)
        if not (watch and as_json):
            _show(record, as_json=as_json)
    if watch:
        _exit(record)


@app.command("list")
def list_batches(
    limit: Annotated[int, typer.Option(help="Maximum number of batches.", min=1)] = 20, as_json: AsJson = False
) -> None:
    """List batches, newest first."""
    with Client() as client:
        records = client.batches.list(limit=limit)
    if as_json:
        for record in records:
            print_json(batch_json(record))
        return
    print_table(
        ("ID", "STATE", "DONE", "LINES", "FAILED", "SUBMITTED"),
        (
            (
                r.id,
                r.state.value,
                f"{r.progress:.0%}",
                r.counts.total,
                r.counts.failed + r.counts.invalid,
                clock_time(r.created_at),
            )
            for r in records
        ),
    )


@app.command()
def results(
    batch_id: BatchId,
    errors: Annotated[bool, typer.Option("--errors", help="Print errors instead of results.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", dir_okay=False, help="File to write to.")] = None,
) -> None:
    """Print the results so far, one JSON object per line. This also works while the batch runs."""
    with Client() as client, ExitStack() as stack:
        target = stack.enter_context(output.open("wb")) if output else sys.stdout.buffer
        for data in client.batches.result_chunks(batch_id, errors=errors):
            target.write(data)
        target.flush()


@app.command()
def cancel(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Cancel a batch: no new job starts, and running jobs stop within a step."""
    with Client() as client:
        _show(client.batches.cancel(batch_id), as_json=as_json)


@app.command()
def pause(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Pause a batch: no more of its jobs enter the queue. Jobs that are already queued still run."""
    with Client() as client:
        client.batches.pause(batch_id)
        _show(client.batches.status(batch_id), as_json=as_json)


@app.command()
def resume(batch_id: BatchId, wait: Wait = False, as_json: AsJson = False) -> None:
    """Resume a paused batch. With --wait, also lead a batch that has lost its dispatcher."""
    with Client() as client:
        client.batches.resume(batch_id)
        _report(client, client.batch(batch_id), wait=wait, as_json=as_json)


@app.command()
def retry(batch_id: BatchId, wait: Wait = False, as_json: AsJson = False) -> None:
    """Submit the lines that did not succeed as a new batch and print its id."""
    with Client() as client:
        _report(client, client.batches.retry(batch_id), wait=wait, as_json=as_json)


def batch_json(record: BatchRecord) -> dict[str, Any]:
    left = record.seconds_left
    shown = {"progress": round(record.progress, 4), "rate": round(record.rate, 2)}
    return {**record.model_dump(mode="json"), **shown, "seconds_left": None if left is None else round(left, 1)}


def batch_line(record: BatchRecord) -> str:
    """A batch as one line."""
    counts = record.counts
    parts = [f"{counts.done} of {counts.total or '?'} lines done"]
    names = ("running", "queued", "waiting", "failed", "invalid", "cancelled", "expired")
    parts += [f"{value} {name}" for name in names if (value := getattr(counts, name))]
    if not record.state.final and record.seconds_left is not None:
        parts.append(f"{record.rate:.1f} per second, {record.seconds_left:.0f} s left")
    paused = " (paused)" if record.paused else ""
    return f"{record.id}  {record.state.value}{paused}  {', '.join(parts)}" + (
        f"  {record.problem}" if record.problem else ""
    )


def _pair(entry: str) -> tuple[str, str]:
    key, equals, value = entry.partition("=")
    if not equals or not key:
        raise InvalidRequest("is not a KEY=VALUE pair", field="--metadata", value=entry, remedy="write KEY=VALUE")
    return key, value


def _show(record: BatchRecord, *, as_json: bool) -> None:
    print_json(batch_json(record)) if as_json else print(batch_line(record), flush=True)


def _report(client: Client, batch: BatchHandle, *, wait: bool, as_json: bool) -> None:
    """Print the id now, or wait and print how the batch ended."""
    if not wait:
        print_json(batch_json(batch.status())) if as_json else print(batch.id)
        return
    if not as_json:
        say(f"batch {batch.id}")
    try:
        with Dispatcher(client.settings):
            record = _watch(client.batches.follow(batch.id), as_json=as_json)
    except KeyboardInterrupt:
        say(f"{batch.id} needs a dispatcher to continue; resume it with: calotype batch resume {batch.id} --wait")
        raise
    if not as_json:
        print(batch_line(record))
    _exit(record)


def _watch(records: Iterable[BatchRecord], *, as_json: bool) -> BatchRecord:
    """Show each change, as a line of JSON or as a bar in a terminal. Returns the last record."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    seen: BatchRecord | None = None
    with Progress(*columns, console=console, disable=as_json or not console.is_terminal) as progress:
        bar = progress.add_task(BatchState.VALIDATING.value, total=None)
        for record in records:
            if as_json and (seen is None or (record.state, record.counts) != (seen.state, seen.counts)):
                print_json(batch_json(record))
            seen = record
            rate = f" {record.rate:.1f}/s" if record.rate else ""
            described = f"{record.state.value}{rate}"
            total = record.counts.total or None
            progress.update(bar, completed=record.counts.done, total=total, description=described)
    assert seen is not None
    return seen


def _exit(record: BatchRecord) -> None:
    """Exit with status 1 unless every line succeeded."""
    if record.state is not BatchState.COMPLETED or record.counts.succeeded < record.counts.total:
        raise typer.Exit(ExitCode.JOB_FAILED)
