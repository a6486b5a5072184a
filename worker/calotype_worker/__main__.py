"""`python -m calotype_worker`: one worker process on one device. `calotype worker` runs exactly this."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calotype_shared.errors import CalotypeError, ServiceUnavailable, SettingsError
from calotype_shared.memory import return_large_blocks
from calotype_shared.observability.logs import set_up_logging
from calotype_shared.options import new_app, parsed, with_options
from calotype_shared.queue.server_check import refuse_unsuitable
from calotype_shared.settings import Settings
from calotype_shared.storage.s3 import Storage
from calotype_worker.settings import WorkerSettings
from calotype_worker.threads import wait_briefly

if TYPE_CHECKING:
    from calotype_worker.worker import Worker

EXIT_USAGE, EXIT_UNAVAILABLE, EXIT_MODEL = 2, 4, 6


def build_app() -> typer.Typer:
    """The single command; returns the given options."""
    app = new_app()

    @app.command()
    @with_options(WorkerSettings, repeated=("model", "lora", "embedding", "control"))
    def worker(
        profile: Annotated[
            bool, typer.Option("--profile", help="Time steps by number of rows, print the figures and exit.")
        ] = False,
        devices: Annotated[
            bool, typer.Option("--devices", help="Print this machine's devices as JSON and exit.")
        ] = False,
        **settings: Any,
    ) -> dict[str, Any]:
        """Serve models on one device. Options override CALOTYPE_WORKER_* variables."""
        return {"profile": profile, "devices": devices, **settings}

    return app


def main(arguments: list[str] | None = None, *, own_process: bool = False) -> int:
    """Returns the exit status: 0 after a drain, 2 invalid settings, 4 Redis or storage unavailable, 6 unusable model.

    With `own_process`, the import of torchao is blocked in this process unless a setting needs it.
    """
    wait_briefly()
    return_large_blocks()
    try:
        options = parsed(build_app(), arguments, name="calotype worker")
        if not isinstance(options, dict):
            return 0  # --help
        if options.pop("devices", False):
            print(json.dumps(devices()))
            return 0
        only_profile = options.pop("profile", False)
        settings = Settings.load()
        worker_settings = WorkerSettings.load(**options)
    except SettingsError as error:
        print(f"calotype worker: {error}", file=sys.stderr)
        return EXIT_USAGE
    if own_process and worker_settings.quantized == "off":
        # diffusers imports torchao if it is installed, which takes two seconds of every start.
        sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
    set_up_logging(log_format=worker_settings.log_format, level=worker_settings.log_level)
    try:
        if only_profile:
            _profile(worker_settings)
            return 0
        check_services(settings, worker_settings)
        worker = _make(settings, worker_settings)
    except CalotypeError as error:
        print(f"calotype worker: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE if isinstance(error, ServiceUnavailable) else EXIT_MODEL
    return worker.run()


def check_services(settings: Settings, options: WorkerSettings) -> None:
    """Check that Redis responds and the bucket exists, before importing torch, which takes seconds.

    Raises:
        ServiceUnavailable: names the service, its address and the remedy.
    """
    refuse_unsuitable(settings)
    Storage(settings).check(create=options.create_bucket)


def devices() -> list[str]:
    """The CUDA devices if there are any, else the CPU."""
    import torch  # noqa: PLC0415 - seconds to import, and `--help` needs none of it

    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu"]


def _profile(options: WorkerSettings) -> None:
    """Print step time by number of rows. Needs neither Redis nor storage."""
    _quieten()
    from calotype_worker.profiling import print_profiles  # noqa: PLC0415

    print_profiles(options)


def _make(settings: Settings, options: WorkerSettings) -> Worker:
    """Build the worker, with library output silenced."""
    _quieten()
    from calotype_worker.worker import Worker  # noqa: PLC0415

    return Worker(settings, options)


def _quieten() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from celery.exceptions import SecurityWarning  # noqa: PLC0415

    # Celery warns about running as root with pickled messages. Our messages are JSON only.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    for noisy in ("torchao", "torch.utils._pytree"):  # diffusers imports torchao if it is installed
        logging.getLogger(noisy).setLevel(logging.ERROR)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    # Process 1 of a container ignores signals without a handler. Without this one, a worker that is stopped while it
    # loads its model would hold its device until it is killed. A ready worker installs its own handler.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    sys.exit(main(own_process=True))
