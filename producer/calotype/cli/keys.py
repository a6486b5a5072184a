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

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Manage the gateway's API keys.")


@contextmanager
def _keys() -> Iterator[ApiKeys]:
    settings = Settings.load()
    with connect_redis(settings) as redis:
        yield ApiKeys(redis, key_prefix=settings.key_prefix)


@app.command()
def create(  # noqa: PLR0917 - the command's options; Typer passes them by name
    name: Annotated[str, typer.Option(help="Description of the key.")],
    tenant: Annotated[str, typer.Option(help="Tenant whose jobs the key can see and submit.")] = "default",
    scope: Annotated[list[Scope] | None, typer.Option(help="Scope; may be repeated [all but admin].")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Maximum requests per minute [no limit].")] = None,
    images_per_day: Annotated[int | None, typer.Option(help="Maximum images per day [no limit].")] = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print its token. The token is not stored and cannot be shown again."""
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
        say(f"created key {key.id} for tenant {key.tenant}; this is the only time its token is shown:")
        print(token)


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List keys, oldest first."""
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
    """Revoke a key permanently. Gateways refuse it within a few seconds."""
    with _keys() as keys:
        if not keys.revoke(key_id):
            report("key_not_found", f"there is no key {key_id!r}; see: calotype keys list", as_json=as_json)
            raise typer.Exit(ExitCode.NOT_FOUND)
    print_json({"id": key_id, "revoked": True}) if as_json else print(f"{key_id}  revoked")


@app.command()
def export() -> None:
    """Print all keys for a backup, one JSON object per line. Contains hashes of the secrets, but no tokens."""
    with _keys() as keys:
        for key in keys.all():
            print_json({**key.model_dump(mode="json"), "scopes": sorted(key.scopes)})


@app.command("import")
def import_keys(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="File printed by `calotype keys export`.")],
    as_json: AsJson = False,
) -> None:
    """Restore keys that Redis has lost. Existing keys stay as they are."""
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            found.append(ApiKey.model_validate_json(line))
        except ValidationError as error:
            raise InvalidRequest(
                f"is not an exported key ({in_short(error)}); nothing was imported",
                field=f"line {number} of {file}",
                value=line,
                remedy="give a file printed by `calotype keys export`",
            ) from None
    with _keys() as keys:
        restored = keys.restore(found)
    if as_json:
        print_json([_json(key) for key in restored])
    else:
        say(f"restored {len(restored)} of {len(found)} keys; the others exist already")


@app.command("webhook-secret")
def webhook_secret(tenant: Annotated[str, typer.Argument(help="Tenant.")] = "default") -> None:
    """Print the secret with which a tenant verifies the signatures of its webhooks."""
    try:
        from calotype.webhooks.signing import tenant_secret  # noqa: PLC0415 - needs the gateway's packages
    except ImportError:
        raise ServiceUnavailable("webhooks need optional packages; run: pip install 'calotype[gateway]'") from None
    settings = Settings.load()
    if settings.webhook_secret is None:
        raise SettingsError("CALOTYPE_WEBHOOK_SECRET is not set, so webhooks are disabled; set it to 32 random bytes")
    print(tenant_secret(settings.webhook_secret.get_secret_value(), tenant))


def _json(key: ApiKey) -> dict[str, Any]:
    return {**key.model_dump(mode="json", exclude={"hash"}), "scopes": sorted(key.scopes)}
