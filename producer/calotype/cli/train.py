"""`calotype train lora|textual-inversion|controlnet`."""

from __future__ import annotations

import os
import sys

import typer

from calotype.embedded import require_worker


def train(context: typer.Context) -> None:
    """Train a LoRA, a textual inversion or a ControlNet; `calotype train --help` shows the options."""
    require_worker()
    os.execv(sys.executable, [sys.executable, "-m", "calotype_train", *context.args])
