"""`RedisAddress`: a parsed Redis URL. Its text never contains a password.

    redis://[user:password@]host[:port][/db]        rediss://… over TLS
    unix:///path/to/socket[?db=0]
    redis+sentinel://[user:password@]host[:port][,host[:port]…]/name[/db]        rediss+sentinel://… over TLS

User and password are the data servers' own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

PORT, SENTINEL_PORT = 6379, 26379


@dataclass(frozen=True, kw_only=True)
class RedisAddress:
    """A parsed Redis URL. `name` is the primary that the sentinels at `hosts` watch."""

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""  # of a socket
    name: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None

    def __str__(self) -> str:
        """The URL without user and password."""
        if self.path:
            return f"unix://{self.path}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{self.scheme}://{hosts}{f'/{self.name}' if self.name else ''}/{self.db}"

    __repr__ = __str__

    @property
    def tls(self) -> bool:
        return self.scheme.startswith("rediss")

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """Parse a URL. Raises ValueError; its message contains no password."""
        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in {"redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel"}:
            raise ValueError("must start with redis://, rediss://, redis+sentinel://, rediss+sentinel:// or unix://")
        rest, _, query = rest.partition("?")
        if scheme == "unix":
            asked = parse_qs(query)
            if set(asked) - {"db"}:
                raise ValueError("allows only ?db= after a socket's path")
            path = unquote(rest.rpartition("@")[2])
            username, password = _account(rest)
            db = _number(asked.get("db", ["0"])[0])
            return cls(scheme=scheme, path=path, db=db, username=username, password=password)
        if query:
            raise ValueError("does not allow ?options; use the settings CALOTYPE_REDIS_… instead")
        authority, _, path = rest.partition("/")
        parts = path.split("/") if path else []
        sentinel = scheme.endswith("+sentinel")
        if sentinel and not (parts and re.fullmatch(r"[\w.-]+", parts[0])):
            raise ValueError("must name the primary that the sentinels watch: redis+sentinel://host:26379/NAME")
        name = parts.pop(0) if sentinel else ""
        if len(parts) > 1:
            raise ValueError("allows only a database number after the host")
        default = SENTINEL_PORT if sentinel else PORT
        hosts = tuple(_host(text, default) for text in authority.rpartition("@")[2].split(","))
        if len(hosts) > 1 and not sentinel:
            raise ValueError("has several hosts; only sentinel URLs can have several")
        db = _number(parts[0]) if parts and parts[0] else 0
        username, password = _account(authority)
        return cls(scheme=scheme, hosts=hosts, name=name, db=db, username=username, password=password)


def _account(authority: str) -> tuple[str | None, str | None]:
    """User and password."""
    username, _, password = authority.rpartition("@")[0].partition(":")
    return unquote(username) or None, unquote(password) or None


def _host(text: str, default: int) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]@]*))(?::(\d{1,5}))?", text)
    if found is None or not 0 < int(found[3] or default) < 65_536:
        raise ValueError("has an invalid host; write host:port")
    return found[1] or found[2] or "127.0.0.1", int(found[3] or default)


def _number(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text):
        raise ValueError("has an invalid database; write a number")
    return int(text)
