"""`calotype worker --profile`: how a step's time grows with its rows on this device, as a table with bars."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from calotype_shared.errors import InvalidRequest
from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.loading import load_models
from calotype_worker.models import ModelPool
from calotype_worker.settings import WorkerSettings

_LEAST_SECONDS = 10.0
_BAR = 32  # characters of the best throughput


def print_profiles(options: WorkerSettings) -> None:
    """Profile the models, for `profile_seconds` but at least ten seconds.

    Raises:
        ModelLoadError: a model cannot be loaded.
        InvalidRequest: in deterministic mode, `max_rows` is always used, so there is nothing to measure.
    """
    if options.deterministic:
        raise InvalidRequest(
            "uses a fixed number of rows, which is not profiled",
            field="deterministic",
            value=True,
            remedy="profile without --deterministic, and pass the knee as --max-rows",
        )
    console = Console()
    settings = EngineSettings(max_rows=options.max_rows, compile=options.compile)
    engine = Engine(ModelPool(load_models(options)), settings)
    for profile in engine.profile(seconds=max(_LEAST_SECONDS, options.profile_seconds)):
        table = Table(
            title=f"{profile.model} {profile.width}x{profile.height} on {options.device}", title_justify="left"
        )
        for heading in ("rows", "ms a step", "rows/s"):
            table.add_column(heading, justify="right")
        table.add_column("throughput", min_width=_BAR)
        table.add_column("")
        best = max(point.rate for point in profile.points)
        for point in profile.points:
            bar = "█" * round(_BAR * point.rate / best)
            note = "◀" if point is profile.knee else ""
            table.add_row(str(point.rows), f"{point.seconds * 1e3:.1f}", f"{point.rate:.1f}", bar, note)
        console.print(table)
