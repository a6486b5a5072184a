"""The HTTP server: uvicorn, with bounds on connections and on the heads of requests, which it has none of itself."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from calotype_shared.memory import return_large_blocks

MAX_CONNECTIONS = 4_000
HEAD_SECONDS = 10.0
HEAD_BYTES, HEADERS = 64 * 2**10, 100
DRAIN_SECONDS = 10.0  # for the rest of a body after its request was answered, so that the client sees the answer
STALLED_SECONDS = 60.0  # without a byte of the response read


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A late or too large head is answered with 400, and the connection is closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._in_head, self._in_body = True, False
        self._head_bytes = self._headers_bytes = 0
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._expect(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._watch_writing(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            if self._timer is None:
                self._expect(HEAD_SECONDS)
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        self._headers_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._headers_bytes += size
        if self._headers_bytes > HEAD_BYTES or len(self.headers) >= HEADERS:
            raise ValueError("the head is too large")  # the parser stops, and uvicorn answers with 400

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head, self._in_body, self._head_bytes = False, True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._in_body = True, False
        self._stop_timer()
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:  # uvicorn's own time-out has ended with the body
            self._expect(HEAD_SECONDS)

    def on_response_complete(self) -> None:
        if self._in_body and not self.transport.is_closing():
            self._expect(DRAIN_SECONDS)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._watch_writing(None)
        super().resume_writing()

    def _watch_writing(self, size: int | None) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        self._stalled = None if size is None else self.loop.call_later(STALLED_SECONDS, self._check_writing, size)

    def _check_writing(self, before: int) -> None:
        size = self.transport.get_write_buffer_size()
        if size >= before:
            self.transport.abort()
        else:
            self._watch_writing(size)

    def _expect(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes:
            self.send_400_response("The head of the request came too slowly.")
        else:
            self.transport.close()


def server_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """How a gateway serves its application. `options` are uvicorn's."""
    _allow_open_files()
    return_large_blocks()
    return uvicorn.Config(app, http=BoundedProtocol, ws="none", access_log=False, server_header=False, **options)


def _allow_open_files() -> None:
    """Raise the limit of open files to what the system allows: many systems start with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 1_000
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
