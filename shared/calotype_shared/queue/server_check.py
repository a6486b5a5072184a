"""`check_server`: whether a Redis server may be trusted with jobs. Looked at once, when a process starts."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from redis import Redis
from redis.exceptions import NoPermissionError

from calotype_shared.errors import RedisUnavailable
from calotype_shared.queue.connection import address_of, connect_redis
from calotype_shared.queue.scripts import Scripted, said_clearly
from calotype_shared.settings import Settings

log = logging.getLogger(__name__)

_RIGHTS = "~{0}* &{0}* +@all -@dangerous +info +keys +client"


@dataclass(frozen=True)
class ServerReport:
    """`problem` is a reason not to start; `warnings` are for the log. Each names the remedy."""

    problem: str | None
    warnings: tuple[str, ...] = ()


def check_server(redis: Redis, *, key_prefix: str) -> ServerReport:
    """Try the rights of this user, and read policy, persistence and mode from INFO, which needs no right to CONFIG.

    Raises:
        RedisUnavailable: it cannot be reached.
    """
    return _Check(redis, key_prefix=key_prefix).report()


def refuse_unsuitable(settings: Settings, *, needed: bool = True) -> None:
    """Log warnings about the server of these settings. Unless `needed`, a server that cannot be reached is no error.

    Raises:
        RedisUnavailable: it may not be used, or cannot be reached.
    """
    with connect_redis(settings) as redis:
        try:
            report = check_server(redis, key_prefix=settings.key_prefix)
        except RedisUnavailable:
            if needed:
                raise
            return
    if report.problem is not None:
        raise RedisUnavailable(report.problem)
    for warning in report.warnings:
        log.warning(warning)


class _Check(Scripted):
    @said_clearly
    def report(self) -> ServerReport:
        where, rights = f"Redis at {address_of(self._redis)}", _RIGHTS.format(self.keys.prefix)
        try:
            info = {str(name): str(value) for name, value in self._redis.info().items()}
        except NoPermissionError:
            info = {}
        if info.get("cluster_enabled") == "1":
            return ServerReport(f"{where} is in cluster mode, which is not supported; use a single primary")
        try:
            problems = self._run("check", [])
        except NoPermissionError as error:
            problems = [str(error)]
        if problems:
            return ServerReport(f"{where} does not allow this user what is needed ({problems[0]}); grant it {rights}")
        if not info:
            return ServerReport(
                None, (f"{where} does not allow INFO, so its eviction policy is unknown; grant this user {rights}",)
            )
        return _of(info, where)


def _of(info: dict[str, str], where: str) -> ServerReport:
    policy, bounded = info.get("maxmemory_policy", "noeviction"), info.get("maxmemory", "0") != "0"
    if bounded and policy.startswith("allkeys"):
        return ServerReport(
            f"{where} deletes any key when its memory is full (maxmemory-policy {policy}), and accepted jobs with it; "
            "set maxmemory-policy noeviction"
        )
    warnings = []
    if bounded and policy != "noeviction":
        warnings.append(
            f"{where} deletes records of finished jobs when its memory is full (maxmemory-policy {policy}); "
            "set maxmemory-policy noeviction"
        )
    if info.get("aof_enabled") == "0":
        warnings.append(f"{where} writes no append-only file, so a restart loses jobs; set appendonly yes")
    return ServerReport(None, tuple(warnings))
