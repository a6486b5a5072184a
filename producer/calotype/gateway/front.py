"""`GuardedRoute`: what happens to a request before its route runs, in this order.

1. Who asks, and whether the key allows this route: before a byte of the body is read.
2. The body, within bounds on its size, on the time it takes, and on what all bodies at one time may occupy.
3. A place among the requests that stay open until images are finished.

Bounds on connections and on heads of requests are in `server.py`, before any of this.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from calotype.gateway.auth import Caller, admit, scope_of
from calotype.gateway.json_body import strict_loads
from calotype.gateway.limits import RETRY_SECONDS, Budget
from calotype.gateway.settings import GatewaySettings

_FILES = "/v1/files"
# The only routes whose bodies contain images.
_IMAGES = re.compile(r"/v1/uploads|/v1/images/edits|/sdapi/v1/(txt2img|img2img|png-info)")
_WAITS = re.compile(r"/v1/images/\w+|/sdapi/v1/(txt2img|img2img)|/v1/jobs/[^/]+/events")
_SMALL = 64 * 2**10  # bytes of a body that is not counted
_COPIES = 2  # of a body in memory while it is parsed
_WAIT_SECONDS = 10.0
# A body may take this long, and longer the more of it has arrived.
_BODY_SECONDS, _BYTES_PER_SECOND = 20.0, 16 * 2**10


class StrictRequest(Request):
    async def json(self) -> Any:
        """Large bodies are parsed in a thread."""
        body = await self.body()
        return strict_loads(body) if len(body) <= _SMALL else await run_in_threadpool(strict_loads, body)


class GuardedRoute(APIRoute):
    """The route class of every router that serves tenants."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        request = Request(scope)
        request.state.caller = caller = await admit(request, scope_of(self.dependant))
        async with request.app.state.front.passed(request, receive, caller) as received:
            await super().handle(scope, received, send)


class Front:
    """The bounds of one gateway process."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._waiting = Budget(
            settings.max_waiting,
            settings.max_waiting_per_tenant,
            wait_seconds=0,
            refusal=f"too many requests already wait for images: at most {settings.max_waiting_per_tenant} of one "
            f"tenant may, {settings.max_waiting} of all; retry in {RETRY_SECONDS:g} s, poll a job instead (/v1/jobs), "
            "start another gateway, or raise CALOTYPE_GATEWAY_MAX_WAITING_PER_TENANT or CALOTYPE_GATEWAY_MAX_WAITING",
        )
        self._uploads = Budget(
            settings.max_uploads,
            settings.max_uploads_per_tenant,
            wait_seconds=_WAIT_SECONDS,
            refusal=f"too many large bodies are on their way (at most {settings.max_uploads_per_tenant} of one tenant, "
            f"{settings.max_uploads} of all); retry, send fewer at one time, or raise "
            "CALOTYPE_GATEWAY_MAX_UPLOADS_PER_TENANT or CALOTYPE_GATEWAY_MAX_UPLOADS",
        )
        self._memory = Budget(
            settings.max_buffered_bytes,
            settings.max_buffered_bytes // 2,
            wait_seconds=_WAIT_SECONDS,
            refusal="the gateway's memory for bodies is in use; retry, send fewer images at one time, or raise "
            "CALOTYPE_GATEWAY_MAX_BUFFERED_BYTES",
        )

    @asynccontextmanager
    async def passed(self, request: Request, receive: Receive, caller: Caller) -> AsyncIterator[Receive]:
        """Yields what the route receives. Raises HTTPException, TooBusy, ClientDisconnect."""
        async with AsyncExitStack() as held:
            if request.method in ("POST", "PUT", "PATCH"):
                receive = await self._body(request, receive, caller, held)
            if _waits(request):
                await held.enter_async_context(self._waiting.taken(caller.tenant))
            yield receive

    async def _body(self, request: Request, receive: Receive, caller: Caller, held: AsyncExitStack) -> Receive:
        limit, setting = self._limit(request.url.path)
        declared = request.headers.get("content-length", "" if "transfer-encoding" in request.headers else "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit, setting)
        bounded = _bounded(receive, limit, setting)
        size = int(declared) if declared.isdigit() else limit
        if size > _SMALL:
            await held.enter_async_context(self._uploads.taken(caller.tenant))
        if request.url.path == _FILES:
            return bounded  # goes to a temporary file
        if size > _SMALL:
            await held.enter_async_context(self._memory.taken(caller.tenant, _COPIES * size))
        return _replayed(await _read(bounded), receive)

    def _limit(self, path: str) -> tuple[int, str]:
        """Bytes that a body may have, and the setting that says so."""
        settings = self._settings
        if path == _FILES:
            return settings.max_file_bytes, "MAX_FILE_BYTES"
        if _IMAGES.fullmatch(path):
            return settings.max_body_bytes, "MAX_BODY_BYTES"
        return min(settings.max_json_bytes, settings.max_body_bytes), "MAX_JSON_BYTES"


def _bounded(receive: Receive, limit: int, setting: str) -> Receive:
    """Raises HTTPException (the framework passes no other one on) for a body that is too large or too slow."""
    clock = asyncio.get_running_loop().time
    began, seen = clock(), 0

    async def bounded() -> Message:
        nonlocal seen
        try:
            async with asyncio.timeout_at(began + _BODY_SECONDS + seen / _BYTES_PER_SECOND):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body came too slowly ({seen} bytes so far); send it again") from None
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit, setting)
        return message

    return bounded


async def _read(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the whole body once, then what comes after it: the client's disconnect."""
    left = [body]

    async def replayed() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replayed


def _too_large(limit: int, setting: str) -> HTTPException:
    return HTTPException(413, f"the body has more than {limit} bytes; send less, or raise CALOTYPE_GATEWAY_{setting}")


def _waits(request: Request) -> bool:
    """Whether the response comes only when images are finished. Polling requests are not limited."""
    if _WAITS.fullmatch(request.url.path):
        return True
    return request.url.path == "/v1/jobs" and "wait" in request.headers.get("prefer", "")
