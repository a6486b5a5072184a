"""The commands about jobs that failed permanently: `calotype dead list`, `show`, `retry`, `drop`."""

from __future__ import annotations

from typing import Annotated

import typer

from calotype.cli.jobs import AsJson
from calotype.cli.output import clock_time, plain, print_json, print_table, record_json, say
from calotype.client import Client
from calotype_shared.errors import InvalidRequest, JobNotFound
from calotype_shared.schema.jobs import JobRecord

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Inspect, retry or drop jobs that failed permanently."
)

_EVERYTHING = 1_000_000
JobIds = Annotated[list[str] | None, typer.Argument(metavar="[ID]...")]
All = Annotated[bool, typer.Option("--all", help="Every dead job, or every one of the tenant given by --tenant.")]
Tenant = Annotated[str | None, typer.Option(help="Only jobs of this tenant.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


@app.command("list")
def list_dead(limit: Annotated[int, typer.Option(min=1)] = 50, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """List dead jobs, newest first."""
    with Client() as client:
        found = client.dead_jobs.list(limit=limit, tenant=tenant)
    if as_json:
        print_json([record_json(record) for record in found])
        return
    columns = ["id", "tenant", "model", "finished", "crashes", "failures", "error"]
    print_table(columns, [_row(record) for record in found])


@app.command()
def show(job_id: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """Show a job's error, its config and the outcome of each attempt."""
    with Client() as client:
        record = client.status(job_id)
    if as_json:
        print_json(record_json(record))
        return
    problem = f"{record.error.code}: {record.error.message}" if record.error else "no error"
    print(plain(f"{record.id}  {record.state.value}, {record.crashes} crashes, {record.failures} failures\n{problem}"))
    print(plain(record.config.canonical_json()))
    attempts = [
        (
            attempt.attempt,
            clock_time(attempt.started_at),
            f"{attempt.ended_at - attempt.started_at:.1f}",
            attempt.worker or "",
            attempt.how,
            f"{attempt.error.code}: {attempt.error.message}" if attempt.error else "",
        )
        for attempt in record.history
    ]
    print_table(["attempt", "started", "seconds", "worker", "ended", "error"], attempts)


@app.command()
def retry(
    ids: JobIds = None, everything: All = False, tenant: Tenant = None, yes: Yes = False, as_json: AsJson = False
) -> None:
    """Submit the configs of dead jobs again as new jobs and print the new ids."""
    with Client() as client:
        for job_id in _chosen(client, ids, "retry", everything=everything, tenant=tenant, yes=yes):
            handle = client.dead_jobs.retry(job_id)
            print_json({"id": handle.id, "retry_of": job_id}) if as_json else print(handle.id, flush=True)


@app.command()
def drop(ids: JobIds = None, everything: All = False, tenant: Tenant = None, yes: Yes = False) -> None:
    """Remove jobs from the list. Their records stay until they expire."""
    with Client() as client:
        for job_id in _chosen(client, ids, "drop", everything=everything, tenant=tenant, yes=yes):
            client.dead_jobs.drop(job_id)
            say(f"dropped {job_id}")


def _chosen(
    client: Client, ids: list[str] | None, what: str, *, everything: bool, tenant: str | None, yes: bool
) -> list[str]:
    """Ids that are all on the list; asks first where all are meant. Raises InvalidRequest, JobNotFound, Abort."""
    if bool(ids) == everything:
        raise InvalidRequest("give either ids or --all", field="ID", value=ids, remedy="give ids, or --all without ids")
    known = [record.id for record in client.dead_jobs.list(limit=_EVERYTHING, tenant=tenant)]
    if ids:
        for job_id in ids:
            if job_id not in known:
                raise JobNotFound(f"job {job_id!r} is not on the list of dead jobs; see: calotype dead list")
        return ids
    if known and not yes:
        typer.confirm(f"{what} {len(known)} dead jobs?", abort=True, err=True)
    return known


def _row(record: JobRecord) -> tuple[object, ...]:
    problem = record.error.code if record.error else ""
    when = clock_time(record.finished_at) if record.finished_at else ""
    return (record.id, record.tenant, record.config.model, when, record.crashes, record.failures, problem)
