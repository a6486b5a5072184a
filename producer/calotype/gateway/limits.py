"""Limits of the gateway: `BodyLimit` on the size of requests, `ConcurrencyLimit` on how many wait for images."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calotype.gateway.errors import TooLarge, problem_of, refusal, respond
from calotype.gateway.settings import GatewaySettings
from calotype_shared.errors import TooBusy

_FILES = "/v1/files"
_WAITS = re.compile(r"/v1/images/\w+|/sdapi/v1/(txt2img|img2img)|/v1/jobs/[^/]+/events")
_RETRY_SECONDS = 5.0


class BodyLimit:
    """ASGI middleware. Files of batches have a limit of their own."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings = self._settings
        limit = settings.max_file_bytes if scope["path"] == _FILES else settings.max_body_bytes
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > limit:
            await self._refuse(scope, receive, send, limit)
            return
        seen, started, refused = 0, False, False

        async def counted() -> Message:
            nonlocal seen, refused
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                refused = True
                return {"type": "http.disconnect"}  # the route stops reading; its answer is replaced below
            return message

        async def answered(message: Message) -> None:
            nonlocal started
            if not refused:
                started = True
                await send(message)

        try:
            await self._app(scope, counted, answered)
        except Exception:
            if not refused:
                raise
        if refused and not started:
            await self._refuse(scope, receive, send, limit)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        error = TooLarge(f"the body has more than {limit} bytes; send less, or raise CALOTYPE_GATEWAY_MAX_BODY_BYTES")
        await respond(Request(scope), problem_of(error), {"Connection": "close"})(scope, receive, send)


class ConcurrencyLimit:
    """ASGI middleware. Limits the requests that stay open until images are finished or that stream events.

    Beyond `most` of them, further ones are refused before they queue anything. Polling requests are not limited.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _waits(scope):
            await self._app(scope, receive, send)
            return
        if self._open >= self._most:
            error = TooBusy(
                f"{self._most} requests already wait for images; retry in {_RETRY_SECONDS:g} s, poll a job "
                "instead (/v1/jobs), start another gateway, or raise CALOTYPE_GATEWAY_MAX_WAITING",
                _RETRY_SECONDS,
            )
            await refusal(Request(scope), error)(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1


def _waits(scope: Scope) -> bool:
    if _WAITS.fullmatch(scope["path"]):
        return True
    return scope["path"] == "/v1/jobs" and any(
        name == b"prefer" and b"wait" in value for name, value in scope["headers"]
    )
