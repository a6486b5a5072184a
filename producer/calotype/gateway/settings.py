"""`GatewaySettings`: one frozen object a gateway process, from `CALOTYPE_GATEWAY_*` and the command line."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from calotype_shared.settings import StrictSettings


class GatewaySettings(StrictSettings):
    """How one gateway listens, and whom it lets in."""

    model_config = SettingsConfigDict(env_prefix="CALOTYPE_GATEWAY_")

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8_000
    """Port to listen on; 0 takes a free one."""
    auth: Literal["auto", "keys", "off"] = "auto"
    """Whether requests need a key; auto: off where only this machine can connect, else keys."""
    allowed_hosts: Annotated[frozenset[str], NoDecode] = frozenset()
    """Further names this machine is asked by, where keys are off; with commas between."""
    max_body_bytes: Annotated[int, Field(ge=1_024)] = 64 * 2**20
    """Of a request, but for files of batches."""
    max_file_bytes: Annotated[int, Field(ge=1_024)] = 4 * 2**30
    """Of a file for batches."""
    max_wait_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Of requests that answer with the finished image."""
    max_waiting: Annotated[int, Field(ge=1)] = 256
    """Such requests, and streams of events, at a time."""
    dispatch: bool = True
    """Lead batches and deliver webhooks too."""
    log_format: Literal["text", "json"] = "text"
    """Of log lines, of `calotype dispatcher` too; "json" for machines."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] | None = None
    """Where operators read `/metrics`, `/healthz` and `/readyz`, apart from the API; without it, nowhere."""
    metrics_host: str = "127.0.0.1"
    """Where that port listens; `0.0.0.0` in a container."""

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
