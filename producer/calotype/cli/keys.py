"""The commands about API keys: `calotype keys create`, `list`, `revoke`, `export`, `import`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from calotype.api_keys import DEFAULT_SCOPES, ApiKey, ApiKeys, Scope
from calotype.cli.exit_codes import ExitCode
from calotype.cli.jobs import AsJson
from calotype.cli.output import clock_time, print_json, print_table, report, say
from calotype_shared.errors import InvalidRequest, ServiceUnavailable, SettingsError
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.records import in_short
from calotype_shared.settings import Settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="API keys of the gateway.")


@contextmanager
def _keys() -> Iterator[ApiKeys]:
    settings = Settings.load()
    with connect_redis(settings) as redis:
        yield ApiKeys(redis, key_prefix=settings.key_prefix)


@app.command()
def create(  # noqa: PLR0917 - the command's options; Typer passes them by name
    name: Annotated[str, typer.Option(help="What it is for.")],
    tenant: Annotated[str, typer.Option(help="Whose jobs it sees and submits.")] = "default",
    scope: Annotated[list[Scope] | None, typer.Option(help="May be repeated [all but admin].")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="No limit if not given.")] = None,
    images_per_day: Annotated[int | None, typer.Option(help="No limit if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key; prints its token, which is stored nowhere and cannot be shown again."""
    with _keys() as keys:
        token, key = keys.create(
            name=name,
            tenant=tenant,
            scopes=scope or DEFAULT_SCOPES,
            requests_per_minute=requests_per_minute,
            images_per_day=images_per_day,
        )
    if as_json:
        print_json({**_json(key), "token": token})
    else:
        say(f"key {key.id} of tenant {key.tenant}; its token is shown only now:")
        print(token)


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys, oldest first."""
    with _keys() as keys:
        found = keys.all()
    if as_json:
        print_json([_json(key) for key in found])
        return
    print_table(
        ("ID", "NAME", "TENANT", "SCOPES", "REQUESTS/MINUTE", "IMAGES/DAY", "CREATED"),
        (
            (
                *(key.id, key.name, key.tenant, " ".join(sorted(key.scopes))),
                *(key.requests_per_minute or "-", key.images_per_day or "-", clock_time(key.created_at)),
            )
            for key in found
        ),
    )


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """Make a key useless, within a few seconds, for good."""
    with _keys() as keys:
        if not keys.revoke(key_id):
            report("key_not_found", f"there is no key {key_id!r}; see: calotype keys list", as_json=as_json)
            raise typer.Exit(ExitCode.NOT_FOUND)
    print_json({"id": key_id, "revoked": True}) if as_json else print(f"{key_id}  revoked")


@app.command()
def export() -> None:
    """Print all keys, one a line, for a copy in a safe place: with hashes of their secrets, and no tokens."""
    with _keys() as keys:
        for key in keys.all():
            print_json({**key.model_dump(mode="json"), "scopes": sorted(key.scopes)})


@app.command("import")
def import_keys(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="As `export` printed it.")],
    as_json: AsJson = False,
) -> None:
    """Put keys back that Redis has lost; those that are there stay as they are."""
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            found.append(ApiKey.model_validate_json(line))
        except ValidationError as error:
            raise InvalidRequest(
                f"is no exported key ({in_short(error)}); nothing was imported",
                field=f"line {number} of {file}",
                value=line,
                remedy="give a file as `calotype keys export` printed it",
            ) from None
    with _keys() as keys:
        restored = keys.restore(found)
    if as_json:
        print_json([_json(key) for key in restored])
    else:
        say(f"{len(restored)} of {len(found)} keys were not there, and are now")


@app.command("webhook-secret")
def webhook_secret(tenant: Annotated[str, typer.Argument(help="Whose.")] = "default") -> None:
    """Print the secret with which a tenant checks the signatures of its webhooks."""
    try:
        from calotype.webhooks.signing import tenant_secret  # noqa: PLC0415 - needs the gateway's packages
    except ImportError:
        raise ServiceUnavailable("webhooks need packages; run: pip install 'calotype[gateway]'") from None
    settings = Settings.load()
    if settings.webhook_secret is None:
        raise SettingsError("CALOTYPE_WEBHOOK_SECRET is not set: there are no webhooks here; set it to 32 random bytes")
    print(tenant_secret(settings.webhook_secret.get_secret_value(), tenant))


def _json(key: ApiKey) -> dict[str, Any]:
    return {**key.model_dump(mode="json", exclude={"hash"}), "scopes": sorted(key.scopes)}
