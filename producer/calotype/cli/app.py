"""The `calotype` command: its subcommands, and the conversion of errors to exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import calotype
from calotype.cli import batch, dead, jobs, keys, model, serve
from calotype.cli.dispatcher import dispatcher
from calotype.cli.exit_codes import ExitCode, exit_code, exit_code_help
from calotype.cli.gateway import gateway
from calotype.cli.gc import gc
from calotype.cli.output import error_details, print_json, report
from calotype.cli.top import top
from calotype.cli.train import train
from calotype_shared.errors import CalotypeError


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="calotype",
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="An asynchronous job queue for diffusion models.",
        epilog=exit_code_help(),
    )
    app.callback()(_root)
    app.command()(serve.up)
    app.command()(serve.demo)
    app.command()(dispatcher)
    app.command()(gateway)
    app.command()(gc)
    # Their options belong to another process and are passed on unchanged, including --help.
    handed_over = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(add_help_option=False, context_settings=handed_over)(serve.worker)
    app.command(add_help_option=False, context_settings=handed_over)(train)
    app.command()(jobs.submit)
    app.command()(jobs.status)
    app.command()(jobs.cancel)
    app.command()(jobs.jobs)
    app.command()(jobs.models)
    app.command()(top)
    app.add_typer(batch.app, name="batch")
    app.add_typer(keys.app, name="keys")
    app.add_typer(dead.app, name="dead")
    app.add_typer(model.app, name="model")
    app.command()(version)
    return app


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """An asynchronous job queue for diffusion models."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


def version(as_json: jobs.AsJson = False) -> None:
    """Print Calotype's version."""
    number = calotype.__version__
    print_json({"version": number}) if as_json else print(f"calotype {number}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status (`exit_codes.MEANINGS`)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in arguments
    try:
        code = build_app()(args=arguments, prog_name="calotype", standalone_mode=False)
        return code if isinstance(code, int) else ExitCode.OK
    except CalotypeError as error:
        report(error.code, str(error), as_json=as_json, details=error_details(error))
        return exit_code(error)
    except typer.TyperException as error:
        report("usage", f"{error.format_message()} (see calotype --help)", as_json=as_json)
        return ExitCode.USAGE
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except OSError as error:
        report("os_error", str(error), as_json=as_json)
        return ExitCode.JOB_FAILED
