"""`Proxy`: a loopback TCP proxy whose network can be cut, swallowed, slowed, or made to answer as a busy S3 server."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

Mode = Literal["pass", "cut", "swallow", "slow", "busy", "forbidden"]
_CHUNK = 65_536
_SLOW_SECONDS = 0.5


class Proxy:
    """Forwards to `target` (host, port). `mode` may be changed at any time.

    pass: everything; cut: connections are closed and new ones refused at once; swallow: connections stay open and
    accepted, and no byte goes through (a black hole, no reset); slow: half a second for whatever comes at once; busy
    and forbidden: HTTP requests are read and answered 503 SlowDown and 403 AccessDenied.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._mode: Mode = "pass"
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    @classmethod
    def before(cls, url: str) -> Proxy:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        return cls((parts.hostname, parts.port))

    def url(self, url: str) -> str:
        """The URL of the target, through here."""
        parts = urlsplit(url)
        userinfo = parts.netloc.rpartition("@")[0]
        address = f"127.0.0.1:{self.port}"
        return urlunsplit(parts._replace(netloc=f"{userinfo}@{address}" if userinfo else address))

    def lead_to(self, url: str) -> None:
        """New connections go to another target."""
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self._target = (parts.hostname, parts.port)

    def set(self, mode: Mode) -> None:
        with self._changed:
            self._mode = mode
            self._changed.notify_all()
            if mode in ("cut", "busy", "forbidden"):
                self._drop()

    def _drop(self) -> None:
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._drop()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = None
        try:
            self._open.add(client)
            self._held()
            if self._mode == "cut":
                return
            if self._mode in ("busy", "forbidden"):
                _answer(client, 503 if self._mode == "busy" else 403)
                return
            server = socket.create_connection(self._target, timeout=5)
            server.settimeout(None)
            self._open.add(server)
            self._relay(client, server)
        except OSError:
            pass
        finally:
            for each in (client, server):
                if each is not None:
                    self._open.discard(each)
                    each.close()

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        """Until either side has closed."""
        back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
        back.start()
        self._pump(client, server)
        back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(_CHUNK):
                self._held()
                if self._mode == "cut":
                    return
                if self._mode == "slow":
                    time.sleep(_SLOW_SECONDS)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for each in (source, sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _held(self) -> None:
        """Wait while bytes are swallowed: they come through later, as after a network's healing."""
        with self._changed:
            self._changed.wait_for(lambda: self._mode != "swallow" or self._closed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TlsFront(Proxy):
    """Speaks TLS with clients, and plainly with a server that does not know it."""

    def __init__(self, target: tuple[str, int], context: ssl.SSLContext) -> None:
        self._context = context
        self.refused: list[str] = []  # why, of each client whose handshake failed
        super().__init__(target)

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        client.settimeout(5)
        try:
            wrapped = self._context.wrap_socket(client, server_side=True)
        except ssl.SSLError as error:
            self.refused.append(str(error))
            raise
        with wrapped as secure:
            secure.settimeout(None)
            # In one thread: OpenSSL's connections may not be read and written at the same time.
            while True:
                ready = [secure] if secure.pending() else select.select([secure, server], [], [])[0]
                for source, sink in ((secure, server), (server, secure)):
                    if source in ready:
                        data = source.recv(_CHUNK)
                        if not data:
                            return
                        sink.sendall(data)


def _answer(client: socket.socket, status: int) -> None:
    """Read one HTTP request whole and refuse it."""
    client.settimeout(5)
    with client.makefile("rb") as request:
        length, expects = 0, False
        while (line := request.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
            expects |= name.lower() == b"expect"
        if expects:
            length = 0  # the body is only sent once we ask for it
        request.read(length)
    code = {503: "SlowDown", 403: "AccessDenied"}[status]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as asked</Message></Error>".encode()
    head = [f"HTTP/1.1 {status} {code}", "Content-Type: application/xml", f"Content-Length: {len(body)}"]
    client.sendall("\r\n".join([*head, "Connection: close", "", ""]).encode() + body)
