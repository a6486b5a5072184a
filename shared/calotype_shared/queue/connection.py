"""Connections to Redis: by address (`address`), over TLS, or through Sentinel. No message contains a password.

TLS verifies certificates and host names, always: with the system's certificate authorities, or with
CALOTYPE_REDIS_CA_FILE.
"""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel

from calotype_shared.errors import RedisUnavailable
from calotype_shared.settings import Settings

SOCKET_SECONDS, CONNECT_SECONDS, HEALTH_SECONDS = 15, 5, 10

_OUTAGES = (
    RedisConnectionError,
    RedisTimeoutError,
    ReadOnlyError,
    OutOfMemoryError,
    MasterDownError,
    ClusterDownError,
    TryAgainError,
    NoPermissionError,
)
# Those for which the client has no class. MISCONF: its disk is full; NOREPLICAS: `min-replicas-to-write`.
_OUTAGE_WORDS = ("MISCONF", "NOREPLICAS", "LOADING", "NOAUTH", "WRONGPASS")


def tls_options(settings: Settings) -> dict[str, Any]:
    """TLS options for redis-py and kombu, which use the same keywords but different URLs."""
    files = {
        "ssl_ca_certs": settings.redis_ca_file,
        "ssl_certfile": settings.redis_cert_file,
        "ssl_keyfile": settings.redis_key_file,
    }
    given = {name: file for name, file in files.items() if file is not None}
    return {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **given}


def sentinel_options(settings: Settings) -> dict[str, Any]:
    """How to connect to the sentinels themselves."""
    password = settings.redis_sentinel_password
    return {
        "socket_timeout": CONNECT_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        **({"password": password.get_secret_value()} if password else {}),
        **({"ssl": True, **tls_options(settings)} if settings.redis.tls else {}),
    }


def connect_redis(settings: Settings) -> Redis:
    """A client that never hangs: it has time-outs, keep-alive, a health check and a few jittered retries.

    A broken connection is retried at once, as after a restart. A time-out is not: redis-py nests its retries (of
    the command, the connection and the health check), and each would wait for the whole time-out again.
    """
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), 3, supported_errors=(RedisConnectionError,))
    address, options = settings.redis, {**connection_options(settings), "retry": retry}
    if address.name:
        sentinel = Sentinel(address.hosts, sentinel_kwargs=sentinel_options(settings))  # type: ignore[no-untyped-call]
        primary: Redis = sentinel.master_for(address.name, **options)  # type: ignore[no-untyped-call]
        return primary
    return Redis(**options)


def connection_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments for redis-py's blocking and asyncio clients."""
    address = settings.redis
    options: dict[str, Any] = {
        "db": address.db,
        "username": address.username,
        "password": address.password,
        "decode_responses": True,
        "socket_timeout": SOCKET_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "health_check_interval": HEALTH_SECONDS,
    }
    if address.path:
        return {**options, "unix_socket_path": address.path}
    options["socket_keepalive"] = True
    if address.tls:
        options |= {"ssl": True, **tls_options(settings)}
    if not address.name:
        options["host"], options["port"] = address.hosts[0]
    return options


def is_outage(error: RedisError) -> bool:
    """Whether Redis is unavailable or refuses requests. Any other error means an invalid request, which is a bug."""
    return isinstance(error, _OUTAGES) or str(error).startswith(_OUTAGE_WORDS)


def unavailable(error: RedisError, where: str) -> RedisUnavailable:
    """The error to raise for an outage. `where` is the server's address without a password."""
    remedy = "start Redis there, or point CALOTYPE_REDIS_URL at it"
    if isinstance(error, AuthenticationError) or str(error).startswith(("NOAUTH", "WRONGPASS")):
        remedy = "check the user and password in CALOTYPE_REDIS_URL"
    elif isinstance(error, NoPermissionError):
        remedy = "allow its user all commands and channels on the keys under CALOTYPE_KEY_PREFIX"
    elif isinstance(error, OutOfMemoryError):
        remedy = "wait until jobs have finished, lower CALOTYPE_MAX_QUEUED, or raise maxmemory"
    elif str(error).startswith("MISCONF"):
        remedy = "free space on its disk"
    elif "CERTIFICATE" in str(error).upper():
        remedy = "set CALOTYPE_REDIS_CA_FILE to the file of its certificate authority"
    return RedisUnavailable(f"Redis at {where} cannot be used ({error}); {remedy}")


def address_of(redis: Redis) -> str:
    """The address that a client connects to, for messages."""
    pool = redis.connection_pool
    if name := getattr(pool, "service_name", None):
        return f"the primary {name!r} of its sentinels"
    options = pool.connection_kwargs
    return str(options.get("path") or f"{options.get('host')}:{options.get('port')}")
