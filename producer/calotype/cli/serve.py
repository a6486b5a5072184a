"""The commands `up`, `worker` and `demo`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from calotype.batches.dispatcher import Dispatcher
from calotype.cli.exit_codes import ExitCode
from calotype.cli.jobs import AsJson
from calotype.cli.output import print_json, say
from calotype.client import Client
from calotype.demo import run_demo
from calotype.embedded import EmbeddedServers, LocalWorkers, local_devices, require_worker
from calotype_shared.errors import ServiceUnavailable, SettingsError

_READY_SECONDS = 300.0  # loading a large model from a slow disk
_WATCH_SECONDS = 0.5

Model = Annotated[str, typer.Option(help="Model as NAME, NAME=FOLDER or NAME=HUB-ID.")]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="Device, such as cpu or cuda:0; may be repeated [all CUDA devices, else cpu]."),
]
WorkerCount = Annotated[
    int | None, typer.Option("--workers", help="Number of workers, spread over the devices [one per device].", min=1)
]


def up(  # noqa: PLR0917 - the command's options; Typer passes them by name
    model: Model = "demo",
    device: Devices = None,
    workers: WorkerCount = None,
    data_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for jobs and images [~/.local/share/calotype].")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the gateway; 0 takes a free one.")] = 8000,
    as_json: AsJson = False,
) -> None:
    """Start Valkey, an S3 server, one worker per device and the gateway; stop them all when interrupted.

    If the gateway's packages are not installed, this process leads batches itself. With --json, one line contains all
    addresses and the environment variables that other commands need.
    """
    require_worker()
    data_dir = (data_dir or default_data_dir()).expanduser().resolve()
    ready = False
    try:
        with sigterm_interrupts(), ExitStack() as stack:
            listener = stack.enter_context(listening(port)) if gateway_installed() else None
            say(f"starting in {data_dir}")
            servers = stack.enter_context(EmbeddedServers.start(data_dir))
            pool = stack.enter_context(
                LocalWorkers(
                    model=model,
                    devices=spread(device or local_devices(), workers),
                    environment=servers.environment,
                    log_dir=data_dir / "logs",
                    say=say,
                )
            )
            client = stack.enter_context(Client(settings=servers.settings()))
            pool.await_ready(client.workers, _READY_SECONDS)
            url = None
            if listener is not None:
                url = stack.enter_context(serving_http(servers, listener))
            else:
                stack.enter_context(Dispatcher(servers.settings()))
            ready = True
            announce(servers, pool, data_dir, url, as_json=as_json)
            while True:
                time.sleep(_WATCH_SECONDS)
                pool.watch()
    except KeyboardInterrupt:
        say("stopped" if ready else "interrupted during start-up; stopped")
        if not ready:
            raise typer.Exit(ExitCode.INTERRUPTED) from None


def worker(context: typer.Context) -> None:
    """Run one worker process on one device; `calotype worker --help` shows its options."""
    require_worker()
    os.execv(sys.executable, [sys.executable, "-m", "calotype_worker", *context.args])


def demo(
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSON lines file of configs [bundled examples].")
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the images.")] = Path("out"),
    model: Model = "demo",
    device: Devices = None,
    workers: WorkerCount = None,
) -> None:
    """Start all services, make the example images, print measurements, and stop all services."""
    require_worker()
    with sigterm_interrupts():
        failed = run_demo(prompts=prompts, out=out, model=model, devices=spread(device or local_devices(), workers))
    if failed:
        raise typer.Exit(ExitCode.JOB_FAILED)


def default_data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share") / "calotype"


def spread(devices: list[str], workers: int | None) -> list[str]:
    """One worker per device, or `workers` of them spread over the devices in turn."""
    if not devices:
        raise SettingsError("there is no device to run a worker on; give one with --device, such as --device cpu")
    return [devices[number % len(devices)] for number in range(workers or len(devices))]


def gateway_installed() -> bool:
    return all(
        find_spec(name) is not None for name in ("fastapi", "uvicorn", "multipart", "httpx2", "prometheus_client")
    )


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A bound loopback port. Raises ServiceUnavailable."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServiceUnavailable(
                f"port {port} cannot be used ({error.strerror}); give another with --port"
            ) from None
        yield listener


@contextmanager
def serving_http(servers: EmbeddedServers, listener: socket.socket) -> Iterator[str]:
    """Runs the gateway in a thread; yields its address once it answers. Raises ServiceUnavailable."""
    import uvicorn  # noqa: PLC0415 - an extra

    from calotype.gateway.app import create_app  # noqa: PLC0415
    from calotype.gateway.server import server_config  # noqa: PLC0415
    from calotype.gateway.settings import GatewaySettings  # noqa: PLC0415

    options = GatewaySettings.load(host="127.0.0.1", port=listener.getsockname()[1])
    app = create_app(servers.settings(), options)
    config = server_config(app, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="calotype-gateway", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise ServiceUnavailable("the gateway stopped during start-up; see the log lines above")
            time.sleep(0.02)
        yield f"http://127.0.0.1:{options.port}"
    finally:
        server.should_exit = True
        thread.join()


def announce(
    servers: EmbeddedServers, pool: LocalWorkers, data_dir: Path, gateway: str | None, *, as_json: bool
) -> None:
    """Print all addresses: one line of JSON, or lines to paste into a shell."""
    if as_json:
        print_json(
            {
                "gateway_url": gateway,
                "redis_url": servers.valkey.url,
                "s3_endpoint_url": servers.seaweed.endpoint_url,
                "s3_bucket": servers.bucket,
                "model": pool.model.partition("=")[0],
                "workers": [{"device": device, "pid": pid} for device, pid in pool.processes],
                "data_dir": str(data_dir),
                "pid": os.getpid(),
                "environment": servers.environment,
            }
        )
        return
    devices = ", ".join(device for device, _ in pool.processes)
    print(f"ready: model {pool.model.partition('=')[0]} on {devices}; logs in {data_dir / 'logs'}\n")
    print("In another terminal:\n")
    for name, value in servers.environment.items():
        print(f"  export {name}={value}")
    print('\n  calotype submit "a red circle on a blue background" --wait -o out\n')
    if gateway:
        print(f"HTTP: {gateway}/v1 (OpenAI's clients too), {gateway}/sdapi/v1 (AUTOMATIC1111's)\n")
    sys.stdout.flush()
    say("Ctrl-C stops everything")


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Turns SIGTERM and SIGINT into a KeyboardInterrupt, so that both end the process in the same way.

    SIGINT is set explicitly: a shell starts background jobs with SIGINT ignored, and Python then keeps it ignored.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
