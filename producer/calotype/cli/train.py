"""The command that trains: `calotype train lora|textual-inversion|controlnet`."""

from __future__ import annotations

import os
import sys

import typer

from calotype.embedded import require_worker


def train(context: typer.Context) -> None:
    """Teach a model a style, a word or a kind of control; `calotype train --help` shows how."""
    require_worker()
    os.execv(sys.executable, [sys.executable, "-m", "calotype_train", *context.args])
