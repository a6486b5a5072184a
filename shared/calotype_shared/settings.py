"""`Settings`: one frozen object per process, read once from `CALOTYPE_*`. Nothing else reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from calotype_shared.errors import SettingsError
from calotype_shared.queue.address import RedisAddress

PREFIX = "CALOTYPE_"
TENANT_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"  # for `re.fullmatch`: `$` alone allows a final newline
# Variables of other parts of Calotype, which validate them.
OTHER_PREFIXES = ("CALOTYPE_WORKER_", "CALOTYPE_GATEWAY_")


class StrictSettings(BaseSettings):
    """Settings from the environment only, where an unknown or malformed variable is an error that names it."""

    # The text below a field is its description, and becomes docs/reference/settings.md.
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX, use_attribute_docstrings=True)

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
        """Read the environment; `overrides` that are not None take precedence.

        Raises:
            SettingsError: names the variable or option, its value and what would work.
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
            problem = first["msg"].removeprefix("Value error, ")
            if not first["loc"]:  # about several settings; its input would show the values of all of them
                raise SettingsError(f"{problem}; correct the variables or options") from None
            field = str(first["loc"][0])
            name = f"{prefix}{field.upper()}"
            shown = "(hidden)" if "secret" in field or "url" in field else repr(first.get("input"))
            raise SettingsError(f"{name}={shown}: {problem}; correct the variable or option") from None


class Settings(StrictSettings):
    """Settings of producers and workers: Redis, storage, limits and retention."""

    redis_url: Annotated[str, Field(repr=False)] = "redis://127.0.0.1:6379/0"
    """Address of Redis 7 or Valkey: `redis://`, `rediss://` (TLS), `unix://`, `redis+sentinel://HOST,HOST/NAME/DB`
    or `rediss+sentinel://`."""
    redis_ca_file: str | None = None
    """PEM file of the certificate authority that signed the server's certificate. None: the system's authorities."""
    redis_cert_file: str | None = None
    """PEM file of the client certificate, if the server requires one."""
    redis_key_file: str | None = None
    """PEM file of the private key of that certificate."""
    redis_sentinel_password: SecretStr | None = None
    """Password of the sentinels themselves. The data servers' password belongs in the URL."""
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = "calotype:"
    """Prefix of every Redis key."""
    s3_endpoint_url: str | None = None
    """Storage endpoint that producers and workers connect to. None: Amazon S3."""
    s3_public_endpoint_url: str | None = None
    """Storage endpoint used in links to images. None: the same endpoint."""
    s3_bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "calotype"
    """Bucket for images, uploads and batch files."""
    s3_region: str = "us-east-1"
    """Region used to sign storage requests."""
    s3_access_key_id: str | None = None
    """Storage access key. None: boto3's credential chain (environment, instance role, …)."""
    s3_secret_access_key: SecretStr | None = None
    """Secret of the access key."""
    s3_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Maximum time without a byte from storage. A gateway waits for at most 10 seconds."""
    s3_attempts: Annotated[int, Field(ge=1, le=20)] = 5
    """Attempts of a storage request that meets a transient error. A gateway makes at most 2."""
    tenant: Annotated[str, Field(pattern=TENANT_PATTERN)] = "default"
    """Tenant that this process submits for. Tenants share the workers fairly."""
    coalesce: bool = True
    """Generate equal jobs with a given seed only once while one of them is unfinished; the others share its result."""
    reuse_finished: bool = False
    """Return the stored images of an equal finished job instead of generating them again. Needs coalesce."""
    webhook_secret: SecretStr | None = None
    """Master secret from which every tenant's signing secret is derived. None: webhooks are disabled."""
    webhook_allow_private: bool = False
    """Allow webhooks to private network addresses and over plain HTTP."""
    # Jobs of batches are not counted: a batch bounds itself by its window.
    max_queued: Annotated[int, Field(ge=1)] = 100_000
    """Maximum number of queued jobs outside batches; each takes about 2 KB in Redis. Further jobs are refused, and
    the error says when to retry."""
    max_queued_per_tenant: Annotated[int, Field(ge=1)] = 50_000
    """The same limit per tenant."""
    max_open_batches: Annotated[int, Field(ge=1)] = 1_000
    """Maximum number of unfinished batches."""
    max_open_batches_per_tenant: Annotated[int, Field(ge=1)] = 100
    """The same limit per tenant."""
    retention_seconds: Annotated[float, Field(gt=0)] = 7 * 86_400.0
    """How long records of finished jobs are kept."""
    telemetry: Literal["auto", "on", "off"] = "auto"
    """Send OpenTelemetry spans. `auto`: only if OTEL_EXPORTER_OTLP_ENDPOINT names a collector."""
    url_expires_seconds: Annotated[int, Field(ge=1, le=604_800)] = 3_600
    """How long links to images are valid. S3 allows at most one week."""

    @field_validator("redis_url")
    @classmethod
    def _redis_form(cls, url: str) -> str:
        RedisAddress.parse(url)
        return url

    @field_validator("redis_ca_file", "redis_cert_file", "redis_key_file")
    @classmethod
    def _file(cls, name: str | None) -> str | None:
        if name is not None and not os.access(name, os.R_OK):
            raise ValueError("is not a readable file")
        return name

    @model_validator(mode="after")
    def _whole_certificate(self) -> Self:
        if (self.redis_cert_file is None) != (self.redis_key_file is None):
            raise ValueError("redis_cert_file and redis_key_file must be set together; set both, or neither")
        return self

    @property
    def redis(self) -> RedisAddress:
        return RedisAddress.parse(self.redis_url)

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
