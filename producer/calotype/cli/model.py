"""`calotype model check`."""

from __future__ import annotations

import os
import sys

import typer

from calotype.embedded import require_worker

app = typer.Typer(help="Models on this machine and on the hub.")


@app.callback()
def _model() -> None:
    """Models on this machine and on the hub."""


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def check(context: typer.Context) -> None:
    """Report what a model is and whether it will work; `calotype model check --help` shows the options."""
    require_worker()
    os.execv(sys.executable, [sys.executable, "-m", "calotype_worker.model_check", *context.args])
