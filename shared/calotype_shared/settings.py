"""`Settings`: one frozen object a process, read once from `CALOTYPE_*`. Nothing else reads the environment."""

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
TENANT_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"  # for `re.fullmatch`: `$` alone lets a newline through
# Variables of other parts of Calotype, which check them themselves.
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
            if not first["loc"]:  # about several together; its input would show all of them
                raise SettingsError(f"{first['msg']}; correct the variables or options") from None
            field = str(first["loc"][0])
            name = f"{prefix}{field.upper()}"
            shown = "(hidden)" if "secret" in field or "url" in field else repr(first.get("input"))
            raise SettingsError(f"{name}={shown}: {first['msg']}; correct the variable or option") from None


class Settings(StrictSettings):
    """What producers and workers both need: where Redis and storage are, and how long things are kept."""

    redis_url: Annotated[str, Field(repr=False)] = "redis://127.0.0.1:6379/0"
    """Redis 7 or Valkey: `redis://`, `rediss://` (TLS), `unix://`, `redis+sentinel://HOST,HOST/NAME/DB`,
    `rediss+sentinel://`."""
    redis_ca_file: str | None = None
    """PEM file of who signed the server's certificate; none: the system's authorities."""
    redis_cert_file: str | None = None
    """PEM file with this side's own certificate, where the server wants one."""
    redis_key_file: str | None = None
    """PEM file with the key of that certificate."""
    redis_sentinel_password: SecretStr | None = None
    """The sentinels' own; that of the servers is in the URL."""
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = "calotype:"
    """Of every Redis key."""
    s3_endpoint_url: str | None = None
    """Storage as workers reach it; none: Amazon's own."""
    s3_public_endpoint_url: str | None = None
    """Storage as links to images name it; none: the same."""
    s3_bucket: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "calotype"
    """Where images, uploads and the files of batches are kept."""
    s3_region: str = "us-east-1"
    """Region that requests to the storage are signed for."""
    s3_access_key_id: str | None = None
    """None: boto3's own search (environment, instance role, …)."""
    s3_secret_access_key: SecretStr | None = None
    """The secret that belongs to the access key."""
    tenant: Annotated[str, Field(pattern=TENANT_PATTERN)] = "default"
    """Whose jobs this process submits; tenants share the workers fairly."""
    coalesce: bool = True
    """Equal jobs with a given seed, in flight together, are made once."""
    reuse_finished: bool = False
    """And may get the images of an equal job that has finished."""
    webhook_secret: SecretStr | None = None
    """Every tenant's signing secret comes from it; none: no webhooks."""
    webhook_allow_private: bool = False
    """Webhooks to addresses inside this network too, and by plain http."""
    # Jobs of batches are not counted: a batch bounds itself by its window.
    max_queued: Annotated[int, Field(ge=1)] = 100_000
    """Jobs outside batches that may wait, about 2 KB each in Redis; more are refused, with a time to come again."""
    max_queued_per_tenant: Annotated[int, Field(ge=1)] | None = None
    """The same, of one tenant; none: no bound of its own."""
    max_open_batches: Annotated[int, Field(ge=1)] = 1_000
    """Batches that are not final."""
    max_open_batches_per_tenant: Annotated[int, Field(ge=1)] = 100
    """The same, of one tenant."""
    retention_seconds: Annotated[float, Field(gt=0)] = 7 * 86_400.0
    """How long finished jobs' records stay."""
    telemetry: Literal["auto", "on", "off"] = "auto"
    """Spans by OpenTelemetry; "auto": where its own variable OTEL_EXPORTER_OTLP_ENDPOINT names a collector."""
    url_expires_seconds: Annotated[int, Field(ge=1, le=604_800)] = 3_600
    """How long links to images work; S3 allows a week."""

    @field_validator("redis_url")
    @classmethod
    def _redis_form(cls, url: str) -> str:
        RedisAddress.parse(url)
        return url

    @field_validator("redis_ca_file", "redis_cert_file", "redis_key_file")
    @classmethod
    def _file(cls, name: str | None) -> str | None:
        if name is not None and not os.access(name, os.R_OK):
            raise ValueError("is no file that can be read")
        return name

    @model_validator(mode="after")
    def _whole_certificate(self) -> Self:
        if (self.redis_cert_file is None) != (self.redis_key_file is None):
            raise ValueError("redis_cert_file and redis_key_file belong together; give both, or neither")
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
