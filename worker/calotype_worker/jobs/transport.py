"""Celery's settings for reaching Redis, and a transport that survives invalid messages in its lists."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from queue import Empty
from typing import Any
from urllib.parse import quote

from kombu.transport import TRANSPORT_ALIASES, redis

from calotype_shared.queue.connection import sentinel_options, tls_options
from calotype_shared.settings import Settings

log = logging.getLogger(__name__)


class _Tolerant:
    """Drops invalid messages. Kombu has already removed them, and its error would end the worker."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log.warning("message dropped", extra={"reason": f"{type(error).__name__}: {error}"[:200]})
            raise Empty from error


class Channel(_Tolerant, redis.Channel):
    pass


class SentinelChannel(_Tolerant, redis.SentinelChannel):
    pass


class Transport(redis.Transport):
    Channel = Channel


class SentinelTransport(redis.SentinelTransport):
    Channel = SentinelChannel


@dataclass(frozen=True)
class Broker:
    """Celery's connection settings. `url` and `options` may contain passwords."""

    url: str = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    ssl: dict[str, Any] | None = field(default=None, repr=False)


def broker_of(settings: Settings) -> Broker:
    """The broker for these settings. Replaces kombu's registered transports, which it looks up at each failover."""
    TRANSPORT_ALIASES.update(
        redis=f"{__name__}:Transport", rediss=f"{__name__}:Transport", sentinel=f"{__name__}:SentinelTransport"
    )
    address = settings.redis
    account = ""
    if address.username or address.password:
        account = f"{quote(address.username or '', safe='')}:{quote(address.password or '', safe='')}@"
    if address.path:
        return Broker(f"redis+socket://{account}{address.path}?virtual_host={address.db}")
    ssl = tls_options(settings) if address.tls else None
    hosts = [f"{f'[{host}]' if ':' in host else host}:{port}" for host, port in address.hosts]
    if address.name:
        urls = [f"sentinel://{account}{host}/{address.db}" for host in hosts]
        return Broker(";".join(urls), {"master_name": address.name, "sentinel_kwargs": sentinel_options(settings)}, ssl)
    return Broker(f"redis://{account}{hosts[0]}/{address.db}", {}, ssl)
