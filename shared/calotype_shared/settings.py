"""`Settings`: one frozen object a process, read once from `CALOTYPE_*`. Nothing else reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from redis import Redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from calotype_shared.errors import SettingsError

PREFIX = "CALOTYPE_"
# Variables of other parts of Calotype, which check them themselves.
OTHER_PREFIXES = ("CALOTYPE_WORKER_", "CALOTYPE_GATEWAY_")


class StrictSettings(BaseSettings):
    """Settings from the environment only, where an unknown or malformed variable is an error that names it."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the environment; `overrides` that are not None win over it.

        Raises:
            SettingsError: naming the variable or option, its value and what would do.
        """
        prefix = str(cls.model_config["env_prefix"])
        others = tuple(other for other in OTHER_PREFIXES if other != prefix)
        for name in os.environ:
            if not name.startswith(prefix) or name.startswith(others):
                continue
            if name.removeprefix(prefix).lower() not in cls.model_fields:
                known = ", ".join(f"{prefix}{field.upper()}" for field in cls.model_fields)
                raise SettingsError(f"{name} is not a setting; known settings: {known}")
        try:
            return cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = str(first["loc"][0]) if first["loc"] else "settings"
            name = f"{prefix}{field.upper()}"
            shown = "(hidden)" if "secret" in field or "url" in field else repr(first.get("input"))
            raise SettingsError(f"{name}={shown}: {first['msg']}; correct the variable or option") from None


class Settings(StrictSettings):
    """What producers and workers both need: where Redis and storage are, and how long things are kept."""

    redis_url: str = "redis://127.0.0.1:6379/0"
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = "calotype:"
    s3_endpoint_url: str | None = None  # None: Amazon's own
    s3_public_endpoint_url: str | None = None  # what links to pictures start with, if others reach it elsewhere
    s3_bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "calotype"
    s3_region: str = "us-east-1"
    s3_access_key_id: str | None = None  # None: boto3's own search (environment, instance role, …)
    s3_secret_access_key: SecretStr | None = None
    retention_seconds: Annotated[float, Field(gt=0)] = 7 * 86_400.0  # of finished jobs' records
    url_expires_seconds: Annotated[int, Field(ge=1, le=604_800)] = 3_600  # of links to pictures; S3 allows a week

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, url: str) -> str:
        if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return url

    @field_validator("s3_endpoint_url", "s3_public_endpoint_url")
    @classmethod
    def _http_scheme(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).scheme not in ("http", "https"):
            raise ValueError("must start with http:// or https://")
        return url

    def environment(self) -> Mapping[str, str]:
        """These settings as variables, to hand to a child process. Contains secrets: never log it."""
        values = self.model_dump(exclude_none=True)
        return {
            f"{PREFIX}{name.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in values.items()
        }


def connect_redis(settings: Settings) -> Redis:
    """A client that never hangs: bounded time-outs, keep-alive, a health check and a few jittered retries."""
    return Redis.from_url(
        settings.redis_url,
        decode_responses=True,
        socket_timeout=15,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=10,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), 3),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
    )


def redis_address(settings_or_url: Settings | str) -> str:
    """The Redis address without user and password, for messages."""
    url = settings_or_url if isinstance(settings_or_url, str) else settings_or_url.redis_url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
