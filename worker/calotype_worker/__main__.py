"""`python -m calotype_worker`: one worker process on one device. `calotype worker` runs exactly this."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from typing import TYPE_CHECKING

from calotype_shared.errors import CalotypeError, ServiceUnavailable, SettingsError
from calotype_shared.settings import Settings, connect_redis
from calotype_shared.storage import Storage
from calotype_shared.store import JobStore
from calotype_worker.logs import set_up_logging
from calotype_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from calotype_worker.worker import Worker

EXIT_USAGE, EXIT_UNAVAILABLE, EXIT_MODEL = 2, 4, 6


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 after a drain, 2 bad settings, 4 Redis or storage unavailable, 6 unusable model."""
    parser = argparse.ArgumentParser(
        prog="calotype worker",
        description="Serve one model on one device. Options override CALOTYPE_WORKER_* variables.",
    )
    for option, metavar, help_ in (
        ("--model", "NAME[=SOURCE]", "SOURCE: a diffusers folder, OWNER/NAME on the hub, a .safetensors file"),
        ("--lora", "[MODEL/]NAME=FILE", "a LoRA that configs may name"),
        ("--embedding", "[MODEL/]TOKEN=FILE", "a textual inversion that prompts may use"),
        ("--control", "[MODEL/]NAME=SOURCE", "a ControlNet that configs may name"),
    ):
        parser.add_argument(option, metavar=metavar, action="append", help=f"{help_}; may be repeated")
    parser.add_argument("--device", help="cpu or cuda:N (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--max-rows", type=int, help="rows of a step batch at the model's native size")
    parser.add_argument("--concurrency", type=int, help="jobs in flight")
    parser.add_argument("--grace-seconds", type=float, help="for jobs in flight after SIGTERM")
    parser.add_argument("--memory-budget-gib", type=float, help="weights on the device; others wait in main memory")
    parser.add_argument("--offload", choices=["none", "model", "sequential"], help="keep only what works on the device")
    for option in ("attention-slicing", "vae-slicing", "vae-tiling"):
        parser.add_argument(f"--{option}", action="store_true", default=None, help="slower, with less memory")
    parser.add_argument("--deterministic", action="store_true", default=None, help="the same bits in any company")
    parser.add_argument("--log-format", choices=["text", "json"])
    parser.add_argument("--devices", action="store_true", help="print this machine's devices as JSON and exit")
    options = vars(parser.parse_args(arguments))
    if options.pop("devices"):
        print(json.dumps(devices()))
        return 0
    try:
        settings = Settings.load()
        worker_settings = WorkerSettings.load(
            **{name: ",".join(value) if isinstance(value, list) else value for name, value in options.items()}
        )
    except SettingsError as error:
        print(f"calotype worker: {error}", file=sys.stderr)
        return EXIT_USAGE
    set_up_logging(log_format=worker_settings.log_format, level=worker_settings.log_level)
    try:
        check_services(settings, worker_settings)
        worker = _make(settings, worker_settings)
    except CalotypeError as error:
        print(f"calotype worker: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE if isinstance(error, ServiceUnavailable) else EXIT_MODEL
    return worker.run()


def check_services(settings: Settings, options: WorkerSettings) -> None:
    """Redis answers, the bucket is there: looked at before the seconds that torch takes to import.

    Raises:
        ServiceUnavailable: which service, where, and what to do.
    """
    with connect_redis(settings) as redis:
        JobStore(redis, key_prefix=settings.key_prefix).ping()
    Storage(settings).check(create=options.create_bucket)


def devices() -> list[str]:
    """CUDA devices where there are any, else the CPU."""
    import torch  # noqa: PLC0415 - seconds to import, and `--help` needs none of it

    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu"]


def _make(settings: Settings, options: WorkerSettings) -> Worker:
    """The worker, after quieting what its libraries would print over our log."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from celery.exceptions import SecurityWarning  # noqa: PLC0415

    from calotype_worker.worker import Worker  # noqa: PLC0415

    # It warns of root with pickled messages; ours are JSON only, and the images run as another user.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return Worker(settings, options)


if __name__ == "__main__":
    sys.exit(main())
