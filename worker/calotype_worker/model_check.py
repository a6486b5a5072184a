"""`python -m calotype_worker.model_check`: check a model's source without loading it.

`calotype model check` runs exactly this.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from calotype_shared.errors import SettingsError
from calotype_shared.options import new_app, parsed

if TYPE_CHECKING:
    from calotype_worker.models.check import Report

EXIT_USAGE, EXIT_MODEL = 2, 6


def build_app() -> typer.Typer:
    """The single command; returns its arguments."""
    app = new_app()

    @app.command()
    def check(
        source: Annotated[str, typer.Argument(help="Folder, hub id (OWNER/NAME[@REVISION]) or .safetensors file.")],
        variant: Annotated[str | None, typer.Option(help="Variant of the weights, such as fp16.")] = None,
        as_pipeline: Annotated[bool, typer.Option("--as-pipeline", help="As with --run-as pipeline.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    ) -> tuple[str, str | None, bool, bool]:
        """Report what a model is and whether it will work, from headers and small files alone."""
        return source, variant, as_pipeline, as_json

    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 it will load, 2 invalid usage, 6 it will not."""
    try:
        options = parsed(build_app(), arguments, name="calotype model check")
    except SettingsError as error:
        print(f"calotype model check: {error}", file=sys.stderr)
        return EXIT_USAGE
    if not isinstance(options, tuple):
        return 0  # --help
    source, variant, as_pipeline, as_json = options
    report = _check(source, variant=variant, as_pipeline=as_pipeline)
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _print(report)
    return EXIT_MODEL if report.problems else 0


def _check(source: str, *, variant: str | None, as_pipeline: bool) -> Report:
    with _quiet():
        from calotype_worker.models.check import check_source  # noqa: PLC0415 - seconds, and `--help` needs none of it

        return check_source(source, variant=variant, as_pipeline=as_pipeline)


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries say about a model is not part of the report."""
    skipped = "torchao" not in sys.modules
    if skipped:
        sys.modules["torchao"] = None  # type: ignore[assignment] # two seconds to import, and not needed
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if skipped:
            del sys.modules["torchao"]


def _print(report: Report) -> None:
    print(report.source)
    for label, value in (("is", report.what), ("runs", report.runs), ("version", report.version)):
        if value:
            print(f"  {label}: {value}")
    for part in report.parts:
        variant = f", variant {part['variant']}" if part["variant"] else ""
        size = f"{part['parameters'] / 1e6:,.1f}M parameters, {part['dtype']}{variant}, {part['gib']:.2f} GiB"
        print(f"  {part['part']}: {part['class']}, {size}")
    if report.samplers:
        print(f"  samplers: {', '.join(report.samplers)}")
    for text in report.unchecked:
        print(f"  not checked: {text}")
    for problem in report.problems:
        print(f"  PROBLEM: {problem}")
    sure = "will load, as far as was checked" if report.unchecked else "will load"
    print("will not load" if report.problems else sure)


if __name__ == "__main__":
    sys.exit(main())
