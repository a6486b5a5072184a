"""`calotype gateway`: the HTTP API."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from typing import Annotated

import typer

from calotype.cli.output import say
from calotype.cli.serve import sigterm_interrupts
from calotype_shared.errors import ServiceUnavailable
from calotype_shared.observability.logs import set_up_logging
from calotype_shared.queue.server_check import refuse_unsuitable
from calotype_shared.settings import Settings

log = logging.getLogger(__name__)


def gateway(
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000].")] = None,
    auth: Annotated[str | None, typer.Option(help="keys, off, or auto: off on a loopback address, else keys.")] = None,
) -> None:
    """Serve the HTTP APIs until interrupted: Calotype's own, OpenAI's and AUTOMATIC1111's.

    The gateway also leads batches and delivers webhooks, unless CALOTYPE_GATEWAY_DISPATCH=false.
    """
    try:
        import uvicorn  # noqa: PLC0415 - only this command needs it

        from calotype.gateway.app import create_app  # noqa: PLC0415
        from calotype.gateway.server import server_config  # noqa: PLC0415
        from calotype.gateway.settings import GatewaySettings  # noqa: PLC0415
    except ImportError as error:
        raise ServiceUnavailable(
            f"the gateway is not installed ({error.name} is missing); run: pip install 'calotype[gateway]'"
        ) from None
    options = GatewaySettings.load(host=host, port=port, auth=auth)
    set_up_logging(log_format=options.log_format, level=options.log_level)
    settings = Settings.load()
    refuse_unsuitable(settings, needed=False)
    config = server_config(
        create_app(settings, options),
        log_config=None,
        log_level=options.log_level,
        timeout_graceful_shutdown=10,
    )
    with listening(options.host, options.port) as listener, sigterm_interrupts():
        if options.log_format == "json":
            log.info("gateway listens", extra={"url": address(listener), "needs_key": options.needs_key})
        else:
            keys = "requests need an API key" if options.needs_key else "requests need no API key"
            say(f"gateway listens on {address(listener)}; {keys}; Ctrl-C stops it")
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has stopped
            uvicorn.Server(config).run(sockets=[listener])
        log.info("gateway stopped") if options.log_format == "json" else say("stopped")


def listening(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServiceUnavailable."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ServiceUnavailable(
            f"cannot listen on {host!r}, port {port} ({error.strerror}); give another --host or --port"
        ) from None


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
