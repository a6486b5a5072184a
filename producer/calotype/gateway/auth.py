"""`Caller`: who sends a request, for which tenant, and whether their limits allow it."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, cast
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.dependencies.models import Dependant

from calotype.api_keys import ApiKey, ApiKeys, Forbidden, Scope, Unauthorized
from calotype.gateway.state import Services, services_of
from calotype_shared.errors import CalotypeError

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Caller:
    """`key` is None if no keys are required; then everything is allowed."""

    tenant: str
    key: ApiKey | None
    services: Services

    def may(self, scope: Scope) -> bool:
        return self.key is None or scope in self.key.scopes

    @asynccontextmanager
    async def taking(self, *, images: int) -> AsyncIterator[None]:
        """Count images against the key's limit. Those of a submission that is then refused are given back.

        Raises:
            TooManyRequests: fewer images are left for today.
        """
        if self.key is None or self.key.images_per_day is None:
            yield
            return
        # The request itself has already been counted.
        without_rate = self.key.model_copy(update={"requests_per_minute": None})
        await self.services.in_redis(self.services.keys.allow, without_rate, images=images)
        try:
            yield
        except CalotypeError:
            await self.services.in_redis(self.services.keys.allow, without_rate, images=-images)
            raise

    def require_no_quota(self) -> None:
        """A batch's images are counted only when it is validated, which is too late for a quota. Raises Forbidden."""
        if self.key is not None and self.key.images_per_day is not None:
            raise Forbidden(
                "this key has a daily image quota, which cannot be checked for batches; use a key without a quota"
            )


@dataclass(frozen=True)
class Needs:
    """A dependency: the caller. What it needs is checked by `admit`, before the body of the request is read."""

    scope: Scope

    async def __call__(self, request: Request) -> Caller:
        return cast(Caller, request.state.caller)


def scope_of(dependant: Dependant) -> Scope:
    """What a route needs. Each has exactly one `Needs` among its parameters."""
    [scope] = {needs.call.scope for needs in dependant.dependencies if isinstance(needs.call, Needs)}
    return scope


async def admit(request: Request, scope: Scope) -> Caller:
    """The caller, if they may do this. Reads only the head. Raises Unauthorized, Forbidden, TooManyRequests."""
    services = await services_of(request)
    keys = services.keys
    if not services.gateway.needs_key:
        _from_this_machine(request, {*_LOOPBACK, *services.gateway.allowed_hosts})
        return Caller(services.settings.tenant, None, services)
    key = await services.in_redis(_admit, keys, _token(request), scope)
    return Caller(key.tenant, key, services)


def _admit(keys: ApiKeys, token: str, scope: Scope) -> ApiKey:
    """The key of a request. The request counts against the key's limits."""
    key = keys.authenticate(token)
    key.require(scope)
    keys.allow(key)
    return key


def _token(request: Request) -> str:
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if token := request.headers.get("x-api-key"):
        return token
    if kind.lower() == "basic":  # AUTOMATIC1111's clients only support user and password: the password is the key
        return _password(value)
    raise Unauthorized("an API key is required; send it as `Authorization: Bearer ct_…`; see: calotype keys create")


def _password(value: str) -> str:
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except ValueError:  # also of bytes that are not ASCII
        return ""


def _from_this_machine(request: Request, names: Collection[str]) -> None:
    """Without keys, a web page open in a browser on this machine must not act on behalf of its user."""
    host = _host_of(f"//{request.headers.get('host', '')}")
    if host not in names:
        raise Forbidden(
            f"without API keys this gateway accepts only loopback host names, not {host!r}; "
            "use http://127.0.0.1, add the name to CALOTYPE_GATEWAY_ALLOWED_HOSTS, or start it with --auth keys"
        )
    origin = request.headers.get("origin")
    if origin is not None and _host_of(origin) not in names:
        raise Forbidden(f"requests from the origin {origin!r} are not allowed; start the gateway with --auth keys")


def _host_of(url: str) -> str:
    """The URL's host in lower case; empty if it has none or is not a URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


Reader = Annotated[Caller, Depends(Needs(Scope.JOBS_READ))]
Writer = Annotated[Caller, Depends(Needs(Scope.JOBS_WRITE))]
Batcher = Annotated[Caller, Depends(Needs(Scope.BATCHES))]
Admin = Annotated[Caller, Depends(Needs(Scope.ADMIN))]
