"""The two servers a fresh machine needs, in one data directory: Valkey for the queue, SeaweedFS for the images."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol, Self, TypeVar

from calotype.embedded.seaweed import SeaweedServer
from calotype.embedded.valkey import ValkeyServer
from calotype_shared.errors import ServiceUnavailable
from calotype_shared.settings import PREFIX, Settings

DEFAULT_BUCKET = "calotype"
_TAKEN = "address already in use"
_ATTEMPTS = 3  # another process may take a free port before the server binds it


class _Stoppable(Protocol):
    def stop(self) -> None: ...


_Server = TypeVar("_Server", bound=_Stoppable)


class EmbeddedServers:
    """Owns both servers and the data directory's lock. A context manager; `stop` can be called twice.

    Both end with this process, even if it is killed: see `supervisor.py`.
    """

    def __init__(
        self, valkey: ValkeyServer, seaweed: SeaweedServer, *, data_dir: Path, bucket: str, lock: IO[str]
    ) -> None:
        self.valkey = valkey
        self.seaweed = seaweed
        self.data_dir = data_dir
        self.bucket = bucket
        self._lock = lock

    @classmethod
    def start(cls, data_dir: Path, *, bucket: str = DEFAULT_BUCKET, timeout: float = 60.0) -> EmbeddedServers:
        """Start both on free loopback ports and return once both have answered.

        Raises:
            ServiceUnavailable: a server's wheel is missing, it died or stayed silent, or the directory is in use.
        """
        data_dir = data_dir.resolve()
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (data_dir / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ServiceUnavailable(
                f"the data directory {data_dir} is in use by another running Calotype; "
                "stop that one or give another with --data-dir"
            ) from None
        try:
            valkey, seaweed = _start_both(data_dir, bucket, timeout)
        except BaseException:
            lock.close()
            raise
        return cls(valkey, seaweed, data_dir=data_dir, bucket=bucket, lock=lock)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which any Calotype process uses these servers."""
        return {
            "CALOTYPE_REDIS_URL": self.valkey.url,
            "CALOTYPE_S3_ENDPOINT_URL": self.seaweed.endpoint_url,
            "CALOTYPE_S3_ACCESS_KEY_ID": self.seaweed.credentials.access_key_id,
            "CALOTYPE_S3_SECRET_ACCESS_KEY": self.seaweed.credentials.secret_access_key,
            "CALOTYPE_S3_BUCKET": self.bucket,
        }

    def settings(self, **overrides: Any) -> Settings:
        """Settings for these servers; other fields come from the environment or `overrides`."""
        fields = {name.removeprefix(PREFIX).lower(): value for name, value in self.environment.items()}
        return Settings.load(**{**fields, **overrides})

    def stop(self) -> None:
        for server in (self.seaweed, self.valkey):  # in parallel, because each has its own grace period
            server.process.begin_stop()
        self.seaweed.stop()
        self.valkey.stop()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _start_both(data_dir: Path, bucket: str, timeout: float) -> tuple[ValkeyServer, SeaweedServer]:
    with ThreadPoolExecutor(2) as pool:
        valkey = pool.submit(_retried, lambda: ValkeyServer.start(data_dir / "valkey", timeout=timeout))
        seaweed = pool.submit(
            _retried, lambda: SeaweedServer.start(data_dir / "seaweedfs", bucket=bucket, timeout=timeout)
        )
        try:
            return valkey.result(), seaweed.result()
        except BaseException:
            for starting in (valkey, seaweed):
                if starting.exception() is None:
                    starting.result().stop()
            raise


def _retried(start: Callable[[], _Server]) -> _Server:
    """Retry with other ports if a port was taken in between."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return start()
        except ServiceUnavailable as error:
            if attempt == _ATTEMPTS or _TAKEN not in str(error).lower():
                raise
    raise AssertionError("unreachable")
