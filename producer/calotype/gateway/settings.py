"""`GatewaySettings`: one frozen object per gateway process, from `CALOTYPE_GATEWAY_*` and the command line."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from calotype_shared.settings import StrictSettings


class GatewaySettings(StrictSettings):
    """How one gateway listens, and whom it admits."""

    model_config = SettingsConfigDict(env_prefix="CALOTYPE_GATEWAY_")

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8_000
    """Port to listen on. 0: any free port."""
    auth: Literal["auto", "keys", "off"] = "auto"
    """Whether requests need an API key. `auto`: `off` on a loopback address, otherwise `keys`."""
    allowed_hosts: Annotated[frozenset[str], NoDecode] = frozenset()
    """Additional host names accepted in requests when keys are off, separated by commas."""
    aliases: Annotated[Mapping[str, str], NoDecode] = {}
    """Other names of models for the OpenAI and AUTOMATIC1111 APIs, as `gpt-image-1.5=flux,dall-e-3=demo`."""
    default_model: str | None = None
    """Model of the OpenAI API's requests that name none. None: the only model, or `demo`."""
    max_json_bytes: Annotated[int, Field(ge=1_024)] = 2**20
    """Maximum size of a request body without images."""
    max_body_bytes: Annotated[int, Field(ge=1_024)] = 64 * 2**20
    """Maximum size of a request body with images."""
    max_file_bytes: Annotated[int, Field(ge=1_024)] = 4 * 2**30
    """Maximum size of a batch file."""
    max_wait_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Maximum duration of a request that waits for its image."""
    max_waiting: Annotated[int, Field(ge=1)] = 256
    """Maximum number of such requests and of event streams at one time."""
    max_waiting_per_tenant: Annotated[int, Field(ge=1)] = 128
    """The same limit per tenant."""
    max_uploads: Annotated[int, Field(ge=1)] = 64
    """Maximum number of request bodies larger than 64 KiB that are received at one time."""
    max_uploads_per_tenant: Annotated[int, Field(ge=1)] = 16
    """The same limit per tenant."""
    max_buffered_bytes: Annotated[int, Field(ge=2**20)] = 128 * 2**20
    """Maximum memory for request bodies larger than 64 KiB, except batch files. One tenant gets at most half."""
    dispatch: bool = True
    """Also lead batches and deliver webhooks."""
    log_format: Literal["text", "json"] = "text"
    """Log format of the gateway and of `calotype dispatcher`: `text`, or `json` with one object per line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum level of logged events."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] | None = None
    """Port for `/metrics`, `/healthz`, `/readyz` and `/backlog`, separate from the API. None: disabled."""
    metrics_host: str = "127.0.0.1"
    """Address that the metrics port listens on; use `0.0.0.0` in a container."""

    @field_validator("aliases", mode="before")
    @classmethod
    def _pairs(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        pairs = [pair.partition("=")[::2] for pair in given.split(",") if pair.strip()]
        if not all(name.strip() and model.strip() for name, model in pairs):
            raise ValueError("write NAME=MODEL, separated by commas")
        return {name.strip(): model.strip() for name, model in pairs}

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split(cls, names: object) -> object:
        return {name.strip().lower() for name in names.split(",")} - {""} if isinstance(names, str) else names

    @field_validator("auth")
    @classmethod
    def _safe(cls, auth: str, info: ValidationInfo) -> str:
        if auth == "off" and not _is_loopback(info.data.get("host", "")):
            raise ValueError("auth can be off only where host is a loopback address; use keys, or --host 127.0.0.1")
        return auth

    @property
    def needs_key(self) -> bool:
        return self.auth == "keys" or (self.auth == "auto" and not _is_loopback(self.host))


def _is_loopback(host: str) -> bool:
    """Whether only processes on this machine can connect to it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
