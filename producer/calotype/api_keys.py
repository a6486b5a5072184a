"""API keys of the gateway, with their tenants, scopes and limits.

A token is `ct_{id}_{secret}`. Redis stores only a SHA-256 hash of the secret. The secret has 256 random bits, so a slow
hash would not be safer.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, field_validator
from redis import Redis

from calotype_shared.errors import CalotypeError, InvalidRequest, TooBusy
from calotype_shared.queue.scripts import Scripted, said_clearly
from calotype_shared.settings import TENANT_PATTERN

_TOKEN = re.compile(r"ct_([a-z0-9]{8})_([A-Za-z0-9_-]{43})")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_REMEMBERED_SECONDS = 2.0  # a revoked key is valid for at most this long
_REMEMBERED = 1_000
_LONGEST_NAME = 100


class Unauthorized(CalotypeError):
    code = "unauthorized"


class Forbidden(CalotypeError):
    code = "forbidden"


class TooManyRequests(TooBusy):
    code = "rate_limited"


class Scope(StrEnum):
    """What a key allows. All scopes except `admin` cover only the key's tenant."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    BATCHES = "batches"
    ADMIN = "admin"  # workers and queues


DEFAULT_SCOPES = frozenset(Scope) - {Scope.ADMIN}


class ApiKey(BaseModel):
    """A key as it is stored, without its secret."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    tenant: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None
    images_per_day: int | None = None
    created_at: float
    hash: str

    @field_validator("scopes", mode="before")
    @classmethod
    def _known(cls, scopes: Collection[str]) -> list[str]:
        """Ignores unknown scopes, because a newer version may have created the key."""
        return [scope for scope in scopes if scope in set(Scope)]

    def require(self, scope: Scope) -> None:
        """Raises Forbidden."""
        if scope not in self.scopes:
            raise Forbidden(f"this key lacks the scope {scope.value!r}; use one that has it, see: calotype keys list")


class ApiKeys(Scripted):
    """All keys of a deployment. Raises RedisUnavailable when Redis cannot be reached."""

    def __init__(
        self, redis: Redis, *, key_prefix: str = "calotype:", clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(redis, key_prefix=key_prefix)
        self._clock = clock
        self._lock = threading.Lock()
        self._remembered: dict[tuple[str, str], tuple[float, ApiKey]] = {}  # by id and the secret's hash

    @said_clearly
    def create(
        self,
        *,
        name: str,
        tenant: str = "default",
        scopes: Collection[Scope] = DEFAULT_SCOPES,
        requests_per_minute: int | None = None,
        images_per_day: int | None = None,
    ) -> tuple[str, ApiKey]:
        """Create a key. Returns its token, which is not stored, and the stored key. Raises InvalidRequest."""
        if not re.fullmatch(TENANT_PATTERN, tenant):
            raise InvalidRequest(
                "is not a valid tenant name",
                field="tenant",
                value=tenant,
                remedy="use at most 64 lower-case letters, digits, '.', '_' and '-'",
            )
        if not name.isprintable() or not 1 <= len(name) <= _LONGEST_NAME:
            raise InvalidRequest(
                "is not a valid key name",
                field="name",
                value=name,
                remedy=f"use 1 to {_LONGEST_NAME} characters, without control characters",
            )
        unknown = sorted(str(scope) for scope in scopes if scope not in set(Scope))
        if unknown or not scopes:
            raise InvalidRequest(
                "are not scopes", field="scopes", value=unknown, remedy=f"use one or more of: {', '.join(Scope)}"
            )
        for field, limit in (("requests_per_minute", requests_per_minute), ("images_per_day", images_per_day)):
            if limit is not None and (type(limit) is not int or not 1 <= limit <= 10**9):
                raise InvalidRequest(
                    "is not a valid limit",
                    field=field,
                    value=limit,
                    remedy="use an integer from 1 to 1000000000, or none",
                )
        key_id, secret = "".join(secrets.choice(_LETTERS) for _ in range(8)), secrets.token_urlsafe(32)
        key = ApiKey(
            id=key_id,
            name=name,
            tenant=tenant,
            scopes=frozenset(map(Scope, scopes)),
            requests_per_minute=requests_per_minute,
            images_per_day=images_per_day,
            created_at=time.time(),
            hash=_hash(secret),
        )
        self._redis.hset(self.keys.api_keys, key_id, key.model_dump_json())
        return f"ct_{key_id}_{secret}", key

    @said_clearly
    def all(self) -> list[ApiKey]:
        """Oldest first."""
        stored = self._redis.hvals(self.keys.api_keys)
        return sorted((ApiKey.model_validate_json(key) for key in stored), key=lambda key: key.created_at)

    @said_clearly
    def restore(self, keys: Iterable[ApiKey]) -> list[ApiKey]:
        """Restore keys, as returned by `all`, to a Redis that has lost them; returns those that were missing.

        Existing keys stay as they are. A key that was revoked since is valid again: revoke it again.
        """
        return [key for key in keys if self._redis.hsetnx(self.keys.api_keys, key.id, key.model_dump_json())]

    @said_clearly
    def revoke(self, key_id: str) -> bool:
        """Revoke a key; gateways refuse it within seconds. False if it does not exist."""
        self._redis.delete(self.keys.rate_limit(key_id))
        return bool(self._redis.hdel(self.keys.api_keys, key_id))

    @said_clearly
    def authenticate(self, token: str) -> ApiKey:
        """The key of a token. Raises Unauthorized, without saying why the token is invalid."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise Unauthorized("this is not an API key; send one as `Authorization: Bearer ct_…`")
        key_id, hashed = match[1], _hash(match[2])
        with self._lock:
            until, key = self._remembered.get((key_id, hashed), (0.0, None))
        if key is not None and self._clock() < until:
            return key
        stored = self._redis.hget(self.keys.api_keys, key_id)
        key = ApiKey.model_validate_json(stored) if stored is not None else None
        if key is None or not hmac.compare_digest(key.hash, hashed):
            raise Unauthorized("this API key is not valid; create one with: calotype keys create")
        with self._lock:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[key_id, hashed] = (self._clock() + _REMEMBERED_SECONDS, key)
        return key

    @said_clearly
    def allow(self, key: ApiKey, *, images: int = 0) -> None:
        """Count a request and its images against the key's limits. A refused call counts nothing.

        Raises:
            TooManyRequests: with the seconds after which to retry.
            Forbidden: the images exceed the key's daily quota.
        """
        if key.images_per_day is not None and images > key.images_per_day:
            raise Forbidden(
                f"{images} images exceed the daily quota of key {key.id} "
                f"({key.images_per_day}); request fewer, or use another key"
            )
        if key.requests_per_minute is None and (key.images_per_day is None or not images):
            return
        limits = ["" if limit is None else limit for limit in (key.requests_per_minute, key.images_per_day)]
        wait = int(self._run("allow", [key.id, *limits, images])) / 1e6
        if wait:
            raise TooManyRequests(
                f"key {key.id} may make {key.requests_per_minute or 'any number of'} requests a minute and "
                f"{key.images_per_day or 'any number of'} images a day (UTC); wait {math.ceil(wait)} s",
                wait,
            )


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
